"""What TensorBoard reads of a run: its own reader against the journal and the pictures that evaluation left."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import run_ranks
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import RECIPE, TIME_LIMIT, TRAIN, arguments, lines, zero_config

from fcn_dist.data.decoders import decode_image, decode_mask
from fcn_dist.errors import UserError
from fcn_dist.training.boards import RIGHT, UNLABELLED, WRONG, Board, panel
from fcn_dist.training.eventfiles import EventFiles, summary_writer
from fcn_dist.training.layers import describe
from fcn_dist.training.runfolder import RunRecord

COLOURS = [(10, 20, 30), (200, 0, 0)]


def read(run: Path) -> Any:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    return accumulator.Reload()


def scalars(board: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board.Scalars(tag)]


def tensorboard(run: Path, first_step: int, multipliers: dict[str, float]) -> Board:
    return Board(run, a_record(), first_step, multipliers, EventFiles(run, a_record(), first_step))


def a_record() -> RunRecord:
    model = {"classes": ["wall", "sky"], "colours": COLOURS}
    return RunRecord({}, {}, model, "shards", {}, 1, 9, 4, "train.py", "/", {}, {}, {})


def line(event: str, step: int, **figures: Any) -> dict[str, Any]:
    return {"event": event, "step": step, "time": 0.0, **figures}


def test_figures_and_rates_of_each_group_and_no_step_twice_after_a_restart(tmp_path: Path) -> None:
    for first_step, losses in ((0, {2: 3.0, 4: 2.0, 6: 1.0}), (4, {6: 1.5, 8: None})):
        board = tensorboard(tmp_path, first_step, {"trunk": 1.0, "head": 10.0})
        board.hear(line("train", 2, loss=3.0, learning_rate=0.5))  # as a continued journal is told again
        for step, loss in losses.items():
            if step > 2:
                board.hear(line("train", step, loss=loss, learning_rate=0.5))
        board.close()
    found = read(tmp_path)
    assert scalars(found, "train/loss") == [(2, 3.0), (4, 2.0), (6, 1.5)]
    assert scalars(found, "learning_rate/head") == [(step, 5.0) for step in (2, 4, 6, 8)]
    assert "train/step" not in found.Tags()["scalars"] and "train/time" not in found.Tags()["scalars"]
    text = found.Tensors("run.json/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"command": "train.py"' in text


def test_a_run_that_begins_anew_shows_no_step_twice(tmp_path: Path) -> None:
    for losses in ({2: 3.0, 4: 2.0}, {2: 3.5}):
        board = tensorboard(tmp_path, 0, {})
        for step, loss in losses.items():
            board.hear(line("train", step, loss=loss, learning_rate=0.5))
        board.close()
    assert scalars(read(tmp_path), "train/loss") == [(2, 3.5)]


def test_histograms_are_those_of_the_journal(tmp_path: Path) -> None:
    told = describe(torch.tensor([0.0, 0.25, -0.3, 3.0]))
    board = tensorboard(tmp_path, 0, {})
    board.hear(line("layers", 4, layers={"fc6.weight": {"gradient": told}}))
    board.hear(line("layers", 6, layers={"fc6.weight": {"gradient": {**told, "norm": None}}}))
    board.close()
    found = read(tmp_path)
    (event,) = found.Histograms("gradient/fc6.weight")
    counts = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True))
    held = {limit: count for limit, count in counts.items() if count}
    assert held == pytest.approx({2.0**-39: 0.25, 0.5: 0.5, 4.0: 0.25}, abs=1e-5)
    ((step, norm),) = scalars(found, "norm of gradient/fc6.weight")
    assert step == 4 and norm == pytest.approx(told["norm"])


def test_a_panel_has_image_truth_prediction_and_errors() -> None:
    image = np.full((1, 3, 3), 77, np.uint8)
    truth, prediction = np.array([[0, 1, 2]], np.uint8), np.array([[1, 1, 1]], np.uint8)
    shown = panel(image, truth, prediction, np.array([(0, 0, 0), *COLOURS], np.uint8))
    black, first, second = (0, 0, 0), COLOURS[0], COLOURS[1]
    wanted = [(77,) * 3] * 3 + [black, first, second] + [first] * 3 + [UNLABELLED, RIGHT, WRONG]
    assert [tuple(pixel) for pixel in shown[0].tolist()] == wanted


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"fcn-dist\[tensorboard\]"):
        summary_writer()


@pytest.mark.slow
def test_a_training_of_two_ranks_that_is_resumed_shows_all_of_its_journal(shards: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    more = ["log.tensorboard=true", "log.layers=2", "evaluate.every=2", "evaluate.at_end=true", "evaluate.scenes=3"]
    command = arguments(shards, run, recipe, zero_config(3, "bf16"), *(word for one in more for word in ("--set", one)))
    run_ranks(TRAIN, [*command, "--steps", "3"], 2, tmp_path, TIME_LIMIT)
    run_ranks(TRAIN, [*command, "--resume"], 2, tmp_path, TIME_LIMIT)
    found = read(run)
    for tag, event, figure in (
        ("train/loss", "train", lambda line: line["loss"]),
        ("train/images_per_second", "train", lambda line: line["images_per_second"]),
        ("validation/official/mean_iou", "evaluate", lambda line: line["official"]["mean_iou"]),
        ("norm of gradient/fc6.weight", "layers", lambda line: line["layers"]["fc6.weight"]["gradient"]["norm"]),
    ):
        wanted = {line["step"]: figure(line) for line in lines(run, event)}  # type: ignore[no-untyped-call]
        seen = scalars(found, tag)
        assert wanted and [step for step, _ in seen] == list(wanted) and dict(seen) == pytest.approx(wanted), tag
    evaluation = json.loads((run / "predictions" / "evaluation.json").read_text())
    assert evaluation["step"] == 4 and len(evaluation["scenes"]) == 3
    for scene in evaluation["scenes"]:
        *_, last = found.Images(f"scenes/{scene['name']}")
        picture = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)))
        image = decode_image((run / "predictions" / scene["image"]).read_bytes())
        truth = decode_mask((run / "predictions" / scene["truth"]).read_bytes())
        assert image is not None and truth is not None and last.step == 4
        height, width = truth.shape
        assert picture.shape == (height, 4 * width, 3) and np.array_equal(picture[:, :width], image)
    assert [event.step for event in found.Images("confusion")] == [2, 3, 4]
