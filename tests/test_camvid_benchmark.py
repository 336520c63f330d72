"""The benchmarks that train, on drawn scenes and a tiny network: what their tables say is what the runs said."""

import argparse
import json
import sys
from pathlib import Path

import ablation
import camvid
import pytest
import training_run
from measure import Contender, Measured
from safetensors.torch import save_file
from test_pretrained import HEAD, vgg_state

from fcn_dist.config import ModelConfig
from fcn_dist.data.synthetic import render
from fcn_dist.errors import UserError
from fcn_dist.recipefile import load_recipe

TINY = (
    "model.width=0.05",
    f"model.head_width={HEAD}",
    "data.workers=1",
    "data.crop=[48,64]",
    "schedule.warmup_steps=0",
)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """A folder of scenes, and VGG16's convolutions at the width of `TINY`."""
    render(tmp_path / "scenes", training=6, validation=3, size=(48, 64), seed=3)
    save_file(vgg_state(classifier=False), tmp_path / "vgg.safetensors")
    settings = [word for setting in (*TINY, "model.weights_convention=caffe") for word in ("--set", setting)]
    return [str(tmp_path / "scenes"), "--weights", str(tmp_path / "vgg.safetensors"), *settings]


def rows(report: Path, number: int = 0) -> dict[str, list[str]]:
    return {name: cells for name, *cells in json.loads(report.read_text())["tables"][number]["rows"]}


@pytest.mark.slow
def test_seeds_are_trained_scored_and_looked_into(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["camvid.py"])
    steps = ["--set", "schedule.steps=2", "--set", "log.every=1", "--set", "train.global_batch=2"]
    steps += ["--set", "train.auxiliary=0.2"]  # whose heads are among the layers
    camvid.main([*inputs, *steps, "--seeds", "3", "4", "--output", str(tmp_path)])
    report = tmp_path / "camvid-cpu.json"
    found = rows(report)
    assert list(found) == ["seed 3", "seed 4", "mean", "standard deviation", "published, test split"]
    mean = (float(found["seed 3"][1]) + float(found["seed 4"][1])) / 2
    assert float(found["mean"][1]) == pytest.approx(mean, abs=0.006)
    losses = rows(report, 1)
    assert losses["seed 3"] != losses["seed 4"] and all(float(loss) > 0 for loss in losses["seed 3"])
    pages = [(tmp_path / f"camvid-seed-{seed}.html").read_text() for seed in (3, 4)]
    assert all("train.seed=" in page and "data:image/jpeg" in page for page in pages)
    assert "by layer and step" in pages[0] and "log.layers=20" in pages[1]
    gradient = rows(report, 2)
    # Score layers begin at zero: nothing else can learn in the first step.
    assert gradient["step 1"] == ["0.00"] * 6 + ["100.00"]
    assert sum(map(float, gradient["step 2"])) == pytest.approx(100, abs=0.05)


@pytest.mark.slow
def test_a_row_of_the_ablation_is_trained(inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ablation.py"])
    ablation.main([*inputs, "--images", "6", "--only", "batch 2", "--output", str(tmp_path)])
    ((name, cells),) = rows(tmp_path / "ablation-cpu.json").items()
    assert (name, cells[0]) == ("FCN-8s at once, batch 2", "3")
    assert 0 <= float(cells[1]) <= 100 and float(cells[3]) > 0


def test_a_batch_changes_the_steps_and_not_the_images(tmp_path: Path) -> None:
    args = argparse.Namespace(weights=tmp_path / "vgg.safetensors", images=1280, seed=0, only=[], settings=[])
    for training in ablation.trainings(args):
        recipe = load_recipe(training.recipe, training.settings)
        assert recipe.train.global_batch is not None and recipe.schedule.steps is not None
        assert recipe.train.global_batch * recipe.schedule.steps == 1280
        assert recipe.model.at_once == ("at once" in training.name)
        assert (recipe.model.weights is None) == ("not pretrained" in training.name) == (not recipe.model.frozen_stages)


@pytest.mark.parametrize("images", [0, 32, 100])
def test_rows_that_cannot_be_of_as_many_images_are_refused(images: int, tmp_path: Path) -> None:
    args = argparse.Namespace(weights=tmp_path / "vgg.safetensors", images=images, seed=0, only=[], settings=[])
    with pytest.raises(UserError, match=f"--images is {images}.*multiple of"):
        ablation.trainings(args)


def test_every_layer_belongs_to_a_part_of_the_network() -> None:
    stages = camvid.stages_of(ModelConfig())
    convolutions = (
        "features.0",
        "features.2",
        "features.5",
        "features.10",
        "features.14",
        "features.17",
        "features.28",
    )
    found = [camvid.part_of(layer, stages) for layer in convolutions]
    assert found == [f"stage {stage}" for stage in (1, 1, 2, 3, 3, 4, 5)]
    assert {camvid.part_of(layer, stages) for layer in ("fc6", "fc7")} == {"fc6 and fc7"}
    scores = ("score_fr", "score_pool4", "score_pool3", "auxiliary.pool3")
    assert {camvid.part_of(layer, stages) for layer in scores} == {"score layers"}


def test_looks_lie_further_and_further_apart() -> None:
    assert [camvid.spread(count) for count in (1, 2, 5, 9)] == [[0], [0, 1], [0, 1, 3, 4], [0, 1, 3, 7, 8]]
    assert camvid.spread(260) == [0, 1, 3, 7, 15, 31, 63, 127, 255, 259]


def test_a_series_without_all_of_its_figures_does_not_end_well(tmp_path: Path) -> None:
    training = training_run.Training("a", tmp_path)
    done, failed = (Measured(Contender("a", "", {}), [], problem) for problem in ("", "exit code 1"))
    training_run.end([training], [done])
    for found in ([], [failed]):
        with pytest.raises(SystemExit):
            training_run.end([training], found)


def test_a_curve_has_the_means_of_equal_parts() -> None:
    lines = [{"step": step, "loss": float(step)} for step in range(1, 41)]
    points = training_run.curve(lines)
    assert points[0] == (4, 2.5) and points[-1] == (40, 38.5) and len(points) == training_run.POINTS
    assert training_run.curve(lines[:3]) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_folder_that_holds_nothing_of_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither training/index"):
        training_run.shards_of(tmp_path, tmp_path, None)
