"""The model file: what was written is what is read, and whatever else is a clear error."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import DESCRIPTION, tiny_network
from torch import Tensor

from fcn_dist.deploy.modelfile import read_model_file, write_model_file
from fcn_dist.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole model file."""
    found = tmp_path / "model.safetensors"
    write_model_file(found, tiny_network().state_dict(), DESCRIPTION, {"run": "test", "step": 3})
    return found


def rewrite(path: Path, state: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Write the file again with other tensors, or with keys of its JSON changed."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["fcn_dist"])
    save_file(state or load_file(path), path, {"fcn_dist": json.dumps({**content, **changes})})


def test_what_was_written_is_read(path: Path) -> None:
    model, info = read_model_file(path)
    assert info.description == DESCRIPTION
    assert (info.source, info.dtype, info.path) == ({"run": "test", "step": 3}, "float32", path)
    assert not model.training
    for name, tensor in tiny_network().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    image = torch.full((1, 9, 20, 3), 100, dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.allclose(model(image), tiny_network()(image), atol=1e-6)


def test_sixteen_bit_weights_are_read_as_float32(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in tiny_network().state_dict().items()}
    write_model_file(tmp_path / "m.safetensors", state, DESCRIPTION, {})
    model, info = read_model_file(tmp_path / "m.safetensors")
    assert info.dtype == "bfloat16" and model.fc6.weight.dtype == torch.float32
    assert torch.equal(model.fc6.weight, state["fc6.weight"].float())


def test_any_reader_of_safetensors_finds_names_and_json(path: Path) -> None:
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == tiny_network().state_dict().keys()
        content = json.loads(file.metadata()["fcn_dist"])
    assert content["format_version"] == 1
    assert content["model"]["classes"] == list(DESCRIPTION.classes)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors cannot be read"):
        read_model_file(tmp_path / "none.safetensors")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a model file written by launch/convert\.py is needed"):
        read_model_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95" + b"x" * 1000, b"\xff" * 64])
def test_garbage_is_no_model_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is no whole safetensors file"):
        read_model_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UserError, match="is no whole safetensors file"):
        read_model_file(path)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {marker}",)

    torch.save({"model": Payload()}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="is no whole safetensors file"):
        read_model_file(tmp_path / "m.safetensors")
    assert not marker.exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_safetensors_files_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(UserError, match="but not a model of fcn_dist"):
        read_model_file(tmp_path / "m.safetensors")


NOT_A_NUMBER = '{"format_version": 1, "source": {"scores": NaN}}'
HALF_A_CHARACTER = '{"format_version": 1, "model": {"classes": ["\\ud800"]}}'


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model": {}}', "[" * 100_000, NOT_A_NUMBER, HALF_A_CHARACTER])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "m.safetensors", {"fcn_dist": text})
    with pytest.raises(UserError, match="metadata is damaged"):
        read_model_file(tmp_path / "m.safetensors")


def test_a_newer_format_says_what_to_do(path: Path) -> None:
    rewrite(path, format_version=2)
    with pytest.raises(UserError, match=r"has model format 2, and this fcn_dist reads format 1; convert"):
        read_model_file(path)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["sky"]},
        {"config": {"variant": "unet"}},
        {"config": {"depth": 3}},
        {"config": {"width": "wide"}},
        {"preprocessing": {"channel_order": "HSV", "mean": [0, 0, 0], "std": [1, 1, 1]}},
        {"classes": ["x"] * 300, "colours": [[0, 0, 0]] * 300},
    ],
)
def test_an_impossible_network_is_refused(path: Path, change: dict[str, Any]) -> None:
    rewrite(path, model={**DESCRIPTION.as_dict(), **change})
    with pytest.raises(UserError, match="describes no network"):
        read_model_file(path)


def test_a_giant_network_is_refused_before_it_takes_memory(path: Path) -> None:
    giant = replace(DESCRIPTION, config=replace(DESCRIPTION.config, head_width=1_000_000_000))
    rewrite(path, model=giant.as_dict())
    with pytest.raises(UserError, match="not those of the network it describes"):
        read_model_file(path)


def test_missing_unexpected_and_misshapen_tensors_are_named(path: Path) -> None:
    state = load_file(path)
    state["extra"] = state.pop("fc7.bias")
    state["fc6.bias"] = torch.zeros(12)
    rewrite(path, state)
    with pytest.raises(UserError) as caught:
        read_model_file(path)
    for problem in ("fc7.bias is missing", "extra is not part of the network", "fc6.bias is (12,), not (11,)"):
        assert problem in str(caught.value)


def test_integer_weights_are_refused(path: Path) -> None:
    rewrite(path, load_file(path) | {"fc6.bias": torch.zeros(11, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"fc6\.bias is torch\.int64"):
        read_model_file(path)


def test_inference_needs_neither_deepspeed_nor_webdataset_nor_the_rooms_of_training() -> None:
    code = (
        "import sys, fcn_dist; fcn_dist.Predictor; import fcn_dist.commands.predict, fcn_dist.deploy.modelfile;"
        "heavy = ('deepspeed', 'webdataset', 'fcn_dist.data', 'fcn_dist.training', 'fcn_dist.scoring');"
        "print(sorted(m for m in sys.modules if m.startswith(heavy)))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_conversion_needs_no_deepspeed_either() -> None:
    code = "import sys, fcn_dist; fcn_dist.convert; print('deepspeed' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_documented_reader_needs_numpy_and_json_alone(tmp_path: Path, dtype: str) -> None:
    description = replace(DESCRIPTION, config=replace(DESCRIPTION.config, backbone="vgg16_bn"))
    state = tiny_network(description).state_dict()
    card = {"card": {"scores": {"official": {"mean_iou": 0.25}}}}
    write_model_file(tmp_path / "m.safetensors", state, description, card, dtype)
    documented = (Path(__file__).parents[1] / "docs" / "modelfile.md").read_text()
    script = documented.split("```python\n")[1].split("```")[0]
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'safetensors')))\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + script, str(tmp_path / "m.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *lines = done.stdout.splitlines()
    assert first.startswith("fcn8s ['sky', 'sea'") and "'mean_iou': 0.25" in first
    assert {line.split()[0] for line in lines} == state.keys()
    parameters = {name for name, _ in tiny_network(description).named_parameters()}
    for line in lines:
        name, mean = line.split()[0], float(line.split()[-1])
        stored = state[name].to(getattr(torch, dtype)) if name in parameters else state[name]
        assert mean == pytest.approx(float(stored.double().mean()), rel=1e-9, abs=1e-12)
        assert f" {tuple(stored.shape)} " in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_file_is_what_the_formats_own_writer_would_write(tmp_path: Path, dtype: str) -> None:
    description = replace(DESCRIPTION, config=replace(DESCRIPTION.config, backbone="vgg16_bn"))
    network = tiny_network(description)
    write_model_file(tmp_path / "m.safetensors", network.state_dict(), description, {}, dtype)
    parameters = {name for name, _ in network.named_parameters()}
    wanted = {n: t.to(getattr(torch, dtype)) if n in parameters else t for n, t in network.state_dict().items()}
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items())
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file({n: t.contiguous() for n, t in wanted.items()}, tmp_path / "theirs", metadata)
    header, theirs = (tensor_bytes(tmp_path / name) for name in ("m.safetensors", "theirs"))
    assert header == theirs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tensor_may_come_in_runs(tmp_path: Path, dtype: str) -> None:
    state = tiny_network().state_dict()
    write_model_file(tmp_path / "whole", state, DESCRIPTION, {}, dtype)
    runs = {name: (run for run in tensor.flatten().split(37)) for name, tensor in state.items()}
    write_model_file(tmp_path / "runs", runs, DESCRIPTION, {}, dtype)
    assert (tmp_path / "runs").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(AssertionError, match=r"fc7\.bias"):
        write_model_file(tmp_path / "short", state | {"fc7.bias": state["fc7.bias"][1:]}, DESCRIPTION, {}, dtype)


def tensor_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_tensors_are_held_one_at_a_time(tmp_path: Path) -> None:
    state = tiny_network().state_dict()
    living: list[weakref.ref[Tensor]] = []

    class MadeWhenAsked(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            assert sum(reference() is not None for reference in living) <= 1
            tensor: Tensor = state[name].clone()
            living.append(weakref.ref(tensor))
            return tensor

        def __iter__(self) -> Iterator[str]:
            return iter(state)

        def __len__(self) -> int:
            return len(state)

    write_model_file(tmp_path / "m.safetensors", MadeWhenAsked(), DESCRIPTION, {}, "float32")
    assert len(living) == len(state)
