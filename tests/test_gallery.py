"""Scenes kept of the last evaluation: which, and that what is written of them is what the converted file predicts."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from launching import run_alone, run_ranks
from numpy.typing import NDArray
from test_train import TIME_LIMIT, TRAIN, arguments, lines, recipe, zero_config

from fcn_dist.commands.entry import run_script
from fcn_dist.data.shardset import ShardSet
from fcn_dist.deploy.predict import Predictor
from fcn_dist.training.gallery import choose

__all__ = ["recipe"]  # a fixture


def scenes_of(*accuracies: float) -> NDArray[np.int64]:
    """Right and labelled pixels of scenes of so many per cent."""
    return np.array([(round(20 * accuracy), 2000) for accuracy in accuracies], np.int64).reshape(-1, 2)


def names(scenes: NDArray[np.int64], count: int) -> dict[str, int]:
    return {one.name: one.index for one in choose(scenes, count)}


def test_a_third_each_of_the_best_the_middle_and_the_worst() -> None:
    eleven = scenes_of(50, 95, 10, 70, 30, 60, 20, 80, 40, 0, 90)
    assert names(eleven, 9) == {
        **{"best-1": 1, "best-2": 10, "best-3": 7},
        **{"median-1": 5, "median-2": 0, "median-3": 8},
        **{"worst-1": 9, "worst-2": 2, "worst-3": 6},
    }
    assert names(eleven, 3) == {"best-1": 1, "median-1": 0, "worst-1": 9}
    assert names(eleven, 2) == {"best-1": 1, "worst-1": 9} and names(eleven, 1) == {"worst-1": 9}
    assert names(eleven, 0) == {}


@pytest.mark.parametrize("count", range(14))
@pytest.mark.parametrize("scenes", [0, 1, 2, 3, 4, 5, 9, 10])
def test_of_few_scenes_each_is_chosen_once(scenes: int, count: int) -> None:
    chosen = choose(scenes_of(*range(scenes)), count)
    assert len({one.index for one in chosen}) == len(chosen) == min(scenes, count)
    accuracies = [one.right for one in chosen if one.name.startswith(("best", "median"))]
    assert accuracies == sorted(accuracies, reverse=True)


def test_the_share_decides_and_scenes_without_a_label_are_left_out() -> None:
    scenes = np.array([(90, 100), (0, 0), (500, 1000), (9, 9), (900, 1000)], np.int64)
    found = choose(scenes, 9)
    assert {one.name: (one.index, one.right, one.labelled) for one in found} == {
        **{"best-1": (3, 9, 9), "median-1": (0, 90, 100)},
        **{"worst-1": (2, 500, 1000), "worst-2": (4, 900, 1000)},
    }


def labels_of(path: Path) -> NDArray[np.uint8]:
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert labels is not None and labels.dtype == np.uint8 and labels.ndim == 2
    return np.asarray(labels, np.uint8)


def record_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "predictions" / "evaluation.json").read_text()))


def assert_as_converted(run: Path, shards: Path, folder: Path, count: int) -> None:
    """The figures and pictures of the run's record, against the model file's own predictions of every scene."""
    shard_set = ShardSet.open(shards, "validation")
    assert run_script("convert", [str(run), str(folder / "m.safetensors")]) == 0
    predictor = Predictor.from_file(folder / "m.safetensors", "cpu", "float32")
    found = {}
    for index in range(len(shard_set)):
        sample = shard_set.read(index)
        bgr = cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_COLOR)
        truth = cv2.imdecode(np.frombuffer(sample.mask, np.uint8), cv2.IMREAD_UNCHANGED)
        assert bgr is not None and truth is not None
        labels = predictor.predict(np.ascontiguousarray(bgr[..., ::-1]))
        found[sample.key] = (labels, truth, float((labels == truth)[truth > 0].mean()))
    record = record_of(run)
    assert record["num_samples"] == len(found) and len(record["scenes"]) == count
    accuracy = {key: accuracy for key, (_, _, accuracy) in found.items()}
    for scene in record["scenes"]:
        predicted, truth = (labels_of(run / "predictions" / scene[kind]) for kind in ("prediction", "truth"))
        labels, wanted, _ = found[scene["key"]]
        assert (truth == wanted).all() and np.mean(predicted != labels) < 0.002  # two as good as equal: either
        assert scene["right"] == np.count_nonzero((predicted == truth) & (truth > 0))
        assert scene["labelled"] == np.count_nonzero(truth)
        image = (run / "predictions" / scene["image"]).read_bytes()
        assert image == next(s.image for s in map(shard_set.read, range(len(shard_set))) if s.key == scene["key"])
    by_name = {scene["name"]: accuracy[scene["key"]] for scene in record["scenes"]}
    assert by_name["best-1"] == pytest.approx(max(accuracy.values()), abs=0.002)
    assert by_name["worst-1"] == pytest.approx(min(accuracy.values()), abs=0.002)
    assert by_name["median-1"] == pytest.approx(float(np.median(list(accuracy.values()))), abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks", "ema"), [(0, 1, "null"), (1, 3, "0.5"), (2, 2, "null"), (3, 2, "0.5")])
def test_pictures_are_those_of_the_last_evaluation_under_every_stage(
    stage: int, ranks: int, ema: str, shards: Path, recipe: Path, tmp_path: Path
) -> None:
    """With averaged weights, with fewer scenes than ranks in a round, and twice, so that the first are replaced."""
    run, count = tmp_path / "run", 5 if stage % 2 else 3
    settings = {"evaluate.at_end": "true", "evaluate.every": "2", "evaluate.scenes": str(count), "train.ema": ema}
    settings |= {"schedule.learning_rate": "0.02"}
    more = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    if ranks == 3:
        more += ["--set", "train.global_batch=3"]
    run_ranks(TRAIN, arguments(shards, run, recipe, zero_config(stage), *more), ranks, tmp_path, TIME_LIMIT)
    assert_as_converted(run, shards, tmp_path, count)
    last, record = lines(run, "evaluate")[-1], record_of(run)
    assert {key: record[key] for key in ("step", "weights", "official", "paper")} == {
        key: last[key] for key in ("step", "weights", "official", "paper")
    }
    assert record["step"] == 4 and np.array(record["confusion"])[1:].sum() == sum(
        one["truth_pixels"] for one in record["classes"]
    )
    # Nothing is left of the evaluation before, nor of writing.
    names = {path.name for path in (run / "predictions").rglob("*")}
    pictures = {
        f"{scene['name']}{end}" for scene in record["scenes"] for end in (".jpg", "-truth.png", "-prediction.png")
    }
    assert names == {"evaluation.json", "step-00000004", *pictures}


@pytest.mark.slow
def test_pictures_change_neither_scores_nor_weights_and_0_means_none(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    found = []
    for count in (0, 9):
        run = tmp_path / f"run{count}"
        more = ["--set", "evaluate.every=1", "--set", "evaluate.at_end=true", "--set", f"evaluate.scenes={count}"]
        run_alone(TRAIN, arguments(shards, run, recipe, zero_config(2), *more), tmp_path, TIME_LIMIT)
        scores = [line["official"] for line in lines(run, "evaluate")]
        found.append((scores, [line["loss"] for line in lines(run, "train")], record_of(run)["confusion"]))
        assert len(scores) == 4 and len(record_of(run)["scenes"]) == min(count, 5)
    assert found[0] == found[1]
    assert not list((tmp_path / "run0" / "predictions").glob("step-*/*"))


@pytest.mark.slow
def test_where_predictions_cannot_be_written_training_goes_on(shards: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["--set", "evaluate.at_end=true"]
    run_alone(TRAIN, arguments(shards, run, recipe, zero_config(2), "--steps", "3"), tmp_path, TIME_LIMIT)
    (run / "predictions").write_text("in the way")
    output = run_alone(
        TRAIN, arguments(shards, run, recipe, zero_config(2), "--resume", *settings), tmp_path, TIME_LIMIT
    )
    assert "what step 4 predicts is not written" in output and "Not a directory" in output
    assert [line["step"] for line in lines(run, "evaluate")] == [4]
