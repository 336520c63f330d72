"""Graphs for other runtimes, loaded by those; the oracle is the network that the checkpoint was made of."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from saved_run import save_run
from tiny_models import DESCRIPTION

from fcn_dist.commands.entry import run_script
from fcn_dist.deploy import export as module
from fcn_dist.deploy.export import export
from fcn_dist.deploy.imagefiles import read_rgb
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN

onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]


def run_onnx(path: Path, image_NHW3: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    labels, scores = session.run(["labels", "scores"], {"image": image_NHW3})
    return labels, scores


def assert_same(found: tuple[Any, Any], model: FCN, image_NHW3: NDArray[np.uint8], first_label: int = 1) -> None:
    with torch.inference_mode():
        wanted = model(torch.from_numpy(image_NHW3)).numpy()
    labels, scores = (np.asarray(each) for each in found)
    assert labels.dtype == np.uint8 and labels.shape == image_NHW3.shape[:3] and scores.dtype == np.float32
    tolerance = 1e-5 * np.abs(wanted).max()
    assert np.abs(scores - wanted).max() <= tolerance
    # Where two classes are as good as equal, either is right.
    best = np.take_along_axis(wanted, labels[:, None].astype(int) - first_label, axis=1)[:, 0]
    assert (best >= wanted.max(axis=1) - tolerance).all() and len(np.unique(labels)) > 1


def photos(shared_data: Path) -> list[NDArray[np.uint8]]:
    """Real scenes of several sizes, shrunk so that a tiny network's labels vary and time is short."""
    images = [read_rgb(path) for path in sorted((shared_data / "ade20k" / "images").rglob("*.jpg"))[:8]]
    return [np.ascontiguousarray(image[::3, ::3]) for image in images]


@pytest.mark.slow
@pytest.mark.real_data
def test_onnx_labels_real_images_of_several_sizes_as_the_network(tmp_path: Path, shared_data: Path) -> None:
    model = save_run(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "m.onnx", "onnx")
    images = photos(shared_data)
    assert len({image.shape for image in images}) > 2
    for image in images:
        assert_same(run_onnx(tmp_path / "m.onnx", image[None]), model, image[None])


@pytest.mark.slow
def test_the_command_writes_onnx_that_runs_alone_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = replace(DESCRIPTION, score_other=True)
    model = save_run(tmp_path / "run", description=description)
    out = tmp_path / "m.onnx"
    assert run_script("convert", [str(tmp_path / "run"), str(out), "--to", "onnx", "--json", str(tmp_path / "j")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "scores of the probe image against the training engine's" in printed and "images of 3 sizes" in printed
    assert json.loads((tmp_path / "j").read_text())["network_difference"] <= 1e-4
    for size in ((1, 1, 1), (2, 31, 70), (1, 64, 96)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        found = run_onnx(out, image)
        if size[1] > 1:
            assert_same(found, model, image, first_label=0)
    content = json.loads(onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map["fcn_dist"])
    assert content["model"]["classes"] == list(DESCRIPTION.classes) and content["source"]["run"] == "run"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "m.onnx", "j"}


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["same", "reference"])
def test_torch_export_is_loaded_by_torch_alone_for_images_from_33_pixels(tmp_path: Path, geometry: Any) -> None:
    description = replace(DESCRIPTION, config=replace(DESCRIPTION.config, geometry=geometry))
    model = save_run(tmp_path / "run", description=description)
    exported = export(tmp_path / "run", tmp_path / "m.pt2", "torch-export")
    assert exported.probe.difference <= 1e-4 and exported.labels > 10_000
    extra = {"fcn_dist": ""}
    graph = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    assert json.loads(extra["fcn_dist"])["model"]["colours"][0] == [10, 20, 30]
    for size in ((1, 33, 40), (3, 64, 70), (1, 200, 161)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        assert_same(graph(torch.from_numpy(image)), model, image)


FULL = """
import resource, sys
from pathlib import Path
from fcn_dist.deploy import export
from fcn_dist.deploy.modelfile import read_model_file
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    export._write_pt2(*read_model_file(Path(sys.argv[1])), Path(sys.argv[2]))
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.slow
def test_a_disk_without_room_for_a_graph_is_an_error_and_no_crash(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    assert run_script("convert", [str(tmp_path / "run"), str(tmp_path / "m.safetensors")]) == 0
    command = [sys.executable, "-c", FULL, str(tmp_path / "m.safetensors"), str(tmp_path / "m.pt2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "File too large\n"), done.stderr


@pytest.mark.slow
def test_a_graph_that_differs_from_the_network_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "run")
    write = module._write_pt2

    def off_by_a_little(*arguments: Any) -> Any:
        graph = write(*arguments)
        return lambda image: (graph(image)[0], graph(image)[1] * 1.001)

    monkeypatch.setattr(module, "_write_pt2", off_by_a_little)
    with pytest.raises(UserError, match=r"does not give the scores that the training engine recorded.*nothing was"):
        export(tmp_path / "run", tmp_path / "m.pt2", "torch-export")

    def other_labels(*arguments: Any) -> Any:
        graph = write(*arguments)
        return lambda image: (graph(image)[0] % 5 + 1, graph(image)[1])

    monkeypatch.setattr(module, "_write_pt2", other_labels)
    with pytest.raises(UserError, match="does not give the scores that the network gives"):
        export(tmp_path / "run", tmp_path / "m.pt2", "torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(UserError, match=r"needs onnxscript; install the extra: pip install 'fcn-dist\[onnx\]'"):
        export(tmp_path / "run", tmp_path / "m.onnx", "onnx")


@pytest.mark.parametrize("more", [["--dtype", "float16"], ["--from", "pytorch-fcn", "--classes", "names"]])
def test_options_of_model_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert run_script("convert", [str(tmp_path), str(tmp_path / "m.onnx"), "--to", "onnx", *more]) == 2
    assert "leave it out" in capsys.readouterr().err
