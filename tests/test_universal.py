"""Checkpoints that DeepSpeed's own ds_to_universal has turned, by its command; the oracle is what the engine said."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks
from safetensors.torch import load_file
from test_zero import assert_agrees
from tiny_models import DESCRIPTION

from fcn_dist.checkpoints.consolidate import consolidate
from fcn_dist.commands.entry import run_script
from fcn_dist.deploy.convert import convert
from fcn_dist.deploy.export import export
from fcn_dist.errors import UserError

SCRIPT = Path(__file__).with_name("save_checkpoints.py")
STEP = Path("checkpoints") / "step-00000002"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of two ranks, their checkpoints turned; beside each, the engine's own weights."""
    folder = tmp_path_factory.mktemp("saved")
    cases = ("bf16-2", "bf16-3", "fp32-1")
    run_ranks(SCRIPT, [str(folder), *cases], world_size=2, folder=folder, timeout=180)
    for case in cases:
        to_universal(folder / case / STEP)
    return folder


def to_universal(step_dir: Path) -> None:
    """As its documentation says."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
            *("--num_extract_workers", "1", "--num_merge_workers", "1"),
            *("--input_folder", str(step_dir / "deepspeed"), "--output_folder", str(step_dir / "universal")),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def universal(saved: Path, tmp_path: Path) -> Path:
    """One, in a copy of its step's folder, to be damaged."""
    return Path(shutil.copytree(saved / "bf16-2", tmp_path / "run")) / STEP / "universal"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16-2", "bf16-3", "fp32-1"])
def test_a_universal_checkpoint_gives_the_engines_masters_and_scores(saved: Path, tmp_path: Path, case: str) -> None:
    conversion = convert(saved / case / STEP / "universal", tmp_path / "m.safetensors", weights="trained")
    assert_agrees(conversion, {"fp32": "float32", "bf16": "bfloat16"}[case.split("-")[0]])
    stored, wanted = load_file(conversion.path), load_file(saved / f"{case}.safetensors")
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(stored[name], tensor), name


@pytest.mark.slow
def test_deepspeeds_files_are_no_longer_needed(universal: Path, tmp_path: Path) -> None:
    shutil.rmtree(universal.parent / "deepspeed")
    code = run_script("convert", [str(universal), str(tmp_path / "m.safetensors"), "--weights", "trained"])
    assert code == 0 and (tmp_path / "m.safetensors").is_file()


@pytest.mark.slow
def test_averaged_weights_that_were_left_out_are_not_taken_for_trained_ones(universal: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="averaged its weights, and ds_to_universal left the averages out"):
        convert(universal, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="holds no averaged weights"):
        convert(universal, tmp_path / "m.safetensors", weights="averaged")


@pytest.mark.slow
def test_a_graph_may_differ_from_16_bit_scores_as_the_network_in_float32_does(universal: Path, tmp_path: Path) -> None:
    exported = export(universal, tmp_path / "m.pt2", "torch-export", weights="trained")
    assert 1e-4 < exported.probe.difference <= exported.probe.tolerance < 0.1
    assert exported.network.difference <= 1e-5


def remove_module_file(folder: Path) -> None:
    (folder / "mp_rank_00_model_states.pt").unlink()


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = torch.load(folder / name, weights_only=False)
    torch.save(change(content), folder / name)


def forget_buffers(folder: Path) -> None:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        del content["module"]["features.0.weight"]  # frozen, and like a buffer nowhere but here
        return content

    edit(folder, "mp_rank_00_model_states.pt", change)


def shorten(folder: Path) -> None:
    edit(folder, "zero/fc6.bias/fp32.pt", lambda content: {**content, "param": content["param"][:-1].clone()})


def alter(folder: Path) -> None:
    edit(folder, "zero/fc7.weight/fp32.pt", lambda content: {**content, "param": content["param"] * 1.01})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "zero" / "fc7.bias" / "fp32.pt").unlink(), r"no zero/\.\.\./fp32\.pt of fc7\.bias"),
        (lambda folder: (folder / "zero" / "optimizer_state.pt").unlink(), r"optimizer_state\.pt cannot be read"),
        (remove_module_file, r"has no mp_rank_00_model_states\.pt"),
        (forget_buffers, r"features\.0\.weight is missing"),
        (shorten, r"fc6\.bias/fp32\.pt is \(10,\), and fc6\.bias is \(11,\)"),
        (alter, r"not the optimizer's masters rounded, for fc7\.weight"),
        (lambda folder: (folder.parent / "probe.safetensors").unlink(), r"probe\.safetensors is missing"),
        (lambda folder: (folder.parent / "manifest.json").unlink(), r"is no checkpoint whose manifest\.json"),
    ],
)
def test_what_is_missing_or_altered_is_named(
    universal: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(universal)
    with pytest.raises(UserError, match=message):
        convert(universal, tmp_path / "m.safetensors", weights="trained")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero/fc6.bias/fp32.pt", "zero/optimizer_state.pt", "mp_rank_00_model_states.pt"])
def test_a_malicious_pickle_is_refused_by_name_and_never_run(universal: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {marker}",)

    edit(universal, name, lambda content: {**content, "harmless": Payload()})
    with torch.device("meta"):
        model = DESCRIPTION.build()
    with pytest.raises(UserError, match=rf"{Path(name).name} carries posix\.system, which could run code"):
        consolidate(universal, model, "trained")
    assert not marker.exists()
