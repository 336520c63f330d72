"""What is on disk for Weights & Biases, read against the journal; and that it never harms a training."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from jobs import running, train_command
from launching import run_ranks
from PIL import Image
from test_boards import a_record, line
from test_train import RECIPE, TIME_LIMIT, TRAIN, arguments, lines, zero_config
from wandb_files import folders, read_run

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.data.decoders import decode_image
from fcn_dist.errors import EXIT_REQUEUE, UserError
from fcn_dist.training import offlinerun
from fcn_dist.training.boards import Board
from fcn_dist.training.layers import HIGHEST, LOWEST
from fcn_dist.training.offlinerun import OfflineRun, wandb_module


def board_of(run: Path, said: list[str], multipliers: dict[str, float] | None = None) -> Board:
    return Board(run, a_record(), 0, multipliers or {}, OfflineRun(run, a_record(), said.append))


def services() -> list[psutil.Process]:
    """wandb's own processes; other tests leave ranks that wait for them."""
    return [child for child in psutil.Process().children() if child.name().startswith("wandb")]


def service() -> psutil.Process:
    (process,) = services()
    return process


def hear_losses(board: Board, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        board.hear({**line("train", step, loss=loss, learning_rate=0.5), "time": 1000.5 + step})


def test_a_run_goes_on_under_its_id_and_has_no_step_twice(tmp_path: Path) -> None:
    said: list[str] = []
    found = []
    run = tmp_path / "runs" / "fcn8s"
    run.mkdir(parents=True)
    starts: tuple[dict[int, float | None], ...] = ({2: 3.0, 4: 2.0, 6: 1.0}, {2: 3.0, 4: 2.0, 6: 1.5, 8: None})
    for losses in starts:
        exits, variables = (sys.exit, sys.excepthook), {**os.environ}
        board = board_of(run, said, {"trunk": 1.0, "head": 10.0})
        hear_losses(board, losses)
        assert service().is_running()
        board.close()
        assert (sys.exit, sys.excepthook) == exits and {**os.environ} == variables
        assert not services()
        (folder,) = folders(run)
        found.append(read_run(folder))
    first, second = found
    assert first.id == second.id and (second.name, second.project) == ("fcn8s", "fcn-dist") and second.finished
    assert second.config["command"] == "train.py" and second.config["model"]["classes"] == ["wall", "sky"]
    assert first.steps == [2, 4, 6] and second.steps == [2, 4, 6, 8] and not said
    seen = {step: row.get("train/loss") for step, row in second.history.items()}
    assert seen == {2: 3.0, 4: 2.0, 6: 1.5, 8: None}
    assert {row["learning_rate/head"] for row in second.history.values()} == {5.0}
    assert [row["_timestamp"] for row in second.history.values()] == [1002.5, 1004.5, 1006.5, 1008.5]


def test_histograms_are_by_powers_of_two_and_share_a_step_with_figures(tmp_path: Path) -> None:
    board = board_of(tmp_path, [])
    histogram = np.eye(HIGHEST - LOWEST)[37]  # of values from 2 ** -3 to 2 ** -2
    told = {"norm": 2.5, "zeros": 0.25, "histogram": histogram.tolist()}
    board.hear(line("layers", 4, layers={"fc6.weight": {"gradient": told, "weight": {**told, "norm": None}}}))
    hear_losses(board, {4: 1.0})
    board.close()
    ((step, row),) = read_run(folders(tmp_path)[0]).history.items()
    assert (step, row["train/loss"], row["norm of gradient/fc6.weight"]) == (4, 1.0, 2.5)
    held = dict(zip(row["log2 of gradient/fc6.weight.bins"], row["log2 of gradient/fc6.weight.values"], strict=False))
    assert {low: share for low, share in held.items() if share} == {-40: 0.25, -3: 0.75}
    assert not any("weight/fc6" in key for key in row)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_process_of_wandb_that_fails_is_said_once_and_nothing_is_left_of_it(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offlinerun, "ANSWERS_WITHIN", 2.0)
    monkeypatch.setattr(offlinerun, "WAITING", 3)
    board = board_of(tmp_path, [])
    hear_losses(board, {1: 1.0})
    board.close()
    said: list[str] = []
    board = board_of(tmp_path, said)
    victim = service()
    victim.send_signal(number)
    for step in range(1, 300):
        board.hear(line("train", step, learning_rate=0.1, **{f"figure {n}": 1.0 for n in range(300)}))
    board.close()
    assert len(said) == 1 and said[0].startswith("Weights & Biases is left out from about step ")
    assert not victim.is_running() and not services()
    assert read_run(folders(tmp_path)[0]).steps == [1], "what an earlier start has told"


def test_what_cannot_begin_is_said(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("in the way")
    said: list[str] = []
    board = board_of(tmp_path, said)
    hear_losses(board, {1: 1.0, 2: 0.5})
    board.close()
    assert len(said) == 1 and "left out from about step 1" in said[0] and "FileExistsError" in said[0]


def test_a_full_disk_is_said_and_what_an_earlier_start_has_told_is_kept(
    tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    run = small_disk(256)
    said: list[str] = []
    for lines_told in (1, 100):
        board = board_of(run, said)
        for step in range(1, lines_told + 1):
            board.hear(line("train", step, learning_rate=0.1, **{f"figure {n}": 1.0 for n in range(300)}))
        board.close()
    assert len(said) == 1 and "no space left on device" in said[0]
    assert read_run(folders(run)[0]).steps == [1]
    assert not services()


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"fcn-dist\[wandb\]"):
        wandb_module()


@pytest.mark.slow
def test_a_training_of_two_ranks_that_is_resumed_shows_all_of_its_journal_and_needs_no_network(
    shards: Path, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    more = ["log.wandb=true", "log.layers=2", "evaluate.every=2", "evaluate.at_end=true", "evaluate.scenes=3"]
    command = arguments(shards, run, recipe, zero_config(3, "bf16"), *(word for one in more for word in ("--set", one)))
    output = run_ranks(TRAIN, [*command, "--steps", "3"], 2, tmp_path, TIME_LIMIT)
    output += run_ranks(TRAIN, [*command, "--resume"], 2, tmp_path, TIME_LIMIT)
    assert "wandb" not in output.lower() and "Weights & Biases" not in output
    (folder,) = folders(run)
    found = read_run(folder)
    assert found.steps == sorted(set(found.steps)) and found.finished and "train.py" in found.config["command"]
    wanted_figures: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
        ("train/loss", "train", lambda line: line["loss"]),
        ("train/images_per_second", "train", lambda line: line["images_per_second"]),
        ("validation/official/mean_iou", "evaluate", lambda line: line["official"]["mean_iou"]),
        ("norm of gradient/fc6.weight", "layers", lambda line: line["layers"]["fc6.weight"]["gradient"]["norm"]),
    )
    for key, event, figure in wanted_figures:
        wanted = {line["step"]: figure(line) for line in lines(run, event)}
        assert wanted and {step: row[key] for step, row in found.history.items() if key in row} == wanted, key
    confusions = [step for step, row in found.history.items() if "confusion.path" in row]
    assert confusions == [2, 3, 4], "that of step 2 is from the first start, whose folder is gone"
    evaluation = json.loads((run / "predictions" / "evaluation.json").read_text())
    for scene in evaluation["scenes"]:
        picture = np.asarray(Image.open(folder / "files" / found.history[4][f"scenes/{scene['name']}.path"]))
        image = decode_image((run / "predictions" / scene["image"]).read_bytes())
        assert image is not None and np.array_equal(picture[:, : image.shape[1]], image)
        assert picture.shape[1] == 4 * image.shape[1]
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run"], cwd=run, capture_output=True, text=True, timeout=60
    )
    assert "Would sync 1 run(s)" in listed.stderr and found.id in listed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rank", "launcher"])
def test_a_training_that_is_asked_to_stop_saves_and_leaves_no_process(
    target: str, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with running(train_command(shards, run, "--set", "log.wandb=true", ranks=2), run) as job:
        job.until_step(2)
        (job.ranks()[0] if target == "rank" else job.launcher()).terminate()
        job.ended()
    assert "Traceback" not in job.output()
    trained = [line["step"] for line in job.lines("train")]
    assert open_checkpoint(run)[0].state.step == trained[-1]
    found = read_run(folders(run)[0])
    if target == "rank":
        assert job.process.returncode == EXIT_REQUEUE and "Weights & Biases" not in job.output()
        assert found.steps == trained and found.finished
    else:  # it signals every process, and wandb's hears before the rank has told its last step
        assert job.process.returncode == 1, "its own code"
        assert job.output().count("Weights & Biases is left out from about step") == 1, job.output()
        assert found.steps == trained[: len(found.steps)] and not found.finished


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_process_of_wandb_with_it(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(train_command(shards, run, "--set", "log.wandb=true"), run) as job:
        job.until_step(2)
        assert any(psutil.Process(pid).name() == "wandb-core" for pid in job.members())
        job.ranks()[0].kill()
        assert job.ended() == -signal.SIGKILL
