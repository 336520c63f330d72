"""The watchdog: what it concludes from made-up beats, and real ranks that are stopped, stuck, slow or suspended."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import group_members, launch_ranks, run_alone, run_ranks

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.config import TrainConfig
from fcn_dist.errors import EXIT_STUCK, UserError
from fcn_dist.training.beats import Beat, Process, beat_path, read_beat, stack_of, this_process, write_beat
from fcn_dist.training.phases import Phase, PhaseClock
from fcn_dist.training.verdict import Verdict, judge, report

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
HINDERED = ROOT / "tests" / "hindered_ranks.py"
TIME_LIMIT = 200.0  # seconds a launch
LIMIT = 8.0  # seconds, of the watchdog
SURVIVAL = 30.0  # seconds in which the last process must have ended

RECIPE = """
data: {crop: [32, 40], workers: 1}
model: {width: 0.0625, head_width: 24}
schedule: {steps: 100000, learning_rate: 0.002}
train: {global_batch: 6}
evaluate: {at_end: false}
checkpoint: {every: 4}
log: {every: 5}
"""

WAITING = ("loop.py:50 train_steps", "/lib/torch/distributed/distributed_c10d.py:3000 all_reduce")
WORKING = ("loop.py:50 train_steps", "/lib/torch/nn/modules/conv.py:500 forward")


def beat(rank: int, step: int = 7, phase: Phase = Phase.AGREEING, stack: tuple[str, ...] = WAITING) -> Beat:
    return Beat("job", rank, Process("node", 100 + rank, 1), 9, step, phase, 30, 8.0, stack)


def of(*beats: Beat) -> dict[int, Beat]:
    return {one.rank: one for one in beats}


@pytest.mark.parametrize(
    ("beats", "silent", "blamed"),
    [
        pytest.param(of(beat(0), beat(1), beat(2)), {1: "stopped"}, (1,), id="stopped"),
        pytest.param(of(beat(0), beat(2, step=6, stack=WORKING)), {}, (1,), id="never heard of"),
        pytest.param(of(beat(0), beat(1, step=6), beat(2)), {}, (1,), id="a step behind"),
        pytest.param(of(beat(0), beat(1, phase=Phase.DATA, stack=WORKING), beat(2)), {}, (1,), id="a phase behind"),
        pytest.param(
            of(beat(0, phase=Phase.BACKWARD), beat(1, phase=Phase.FORWARD, stack=WORKING)), {}, (1,), id="in forward"
        ),
        pytest.param(
            of(beat(0, phase=Phase.FORWARD), beat(1, phase=Phase.BACKWARD, stack=WORKING)), {}, (1,), id="in backward"
        ),
        pytest.param(
            of(beat(0, phase=Phase.SAVING, stack=WORKING), beat(1, phase=Phase.SAVING)), {}, (0,), id="rank 0 commits"
        ),
        pytest.param(of(beat(0), beat(1)), {}, (), id="all alike"),
        pytest.param(of(beat(0, stack=WORKING)), {}, (0,), id="alone"),
    ],
)
def test_the_rank_that_holds_the_others_up_is_blamed(
    beats: dict[int, Beat], silent: dict[int, str], blamed: tuple[int, ...]
) -> None:
    world_size = max([*beats, 0]) + 1
    assert judge(beats, silent, world_size).ranks == blamed


def test_a_report_names_the_rank_its_place_and_stack_first_and_puts_like_ranks_together() -> None:
    beats = of(beat(0), beat(1, phase=Phase.DATA, stack=WORKING), beat(2))
    text = report(beats, Verdict((1,), "stuck"), 8.4, "ranks/stuck-x", 3).splitlines()
    assert "8 s" in text[0] and "code 77" in text[0]
    blamed = "rank 1 (host node, pid 101) holds the others up in step 7, taking data: stuck; the others wait in step 7"
    assert text[1] == blamed + ", agreeing"
    assert text[2].startswith("rank 1 (host node, pid 101): in step 7, taking data")
    assert [line.strip() for line in text[3:5]] == list(WORKING)
    assert text[5].startswith("rank 0 (host node, pid 100), rank 2 (host node, pid 102): in step 7, agreeing")
    assert len(text) == 9 and "ranks/stuck-x" in text[8]


def test_a_beat_is_read_as_it_was_written_by_its_own_job_alone(tmp_path: Path) -> None:
    written = beat(3)
    write_beat(tmp_path, written)
    read = read_beat(tmp_path, 3, "job")
    assert read and read[0] == written
    assert read_beat(tmp_path, 3, "another") is None and read_beat(tmp_path, 4, "job") is None
    for damage in ("", "{", "[]", '{"job": "job"}', json.dumps({"job": "job", "phase": "dreaming"})):
        beat_path(tmp_path, 3).write_text(damage)
        assert read_beat(tmp_path, 3, "job") is None


def test_a_process_is_known_by_its_start_as_well_as_its_number() -> None:
    own = this_process()
    assert own.state() == "R"
    assert replace(own, started=own.started + 1).state() == ""
    assert replace(own, host="another").state() is None


def test_a_stack_ends_with_the_innermost_call() -> None:
    stack = stack_of(threading.main_thread().ident or 0)
    assert stack[-1].endswith("stack_of") and "test_a_stack_ends" in stack[-2]


def test_the_clock_adds_up_each_phase_and_every_entry_and_advance_is_progress() -> None:
    began: list[Phase] = []
    clock = PhaseClock(4, began.append)
    clock.enter(Phase.DATA, 5)
    clock.enter(Phase.AGREEING)
    clock.add_wait(2.0)
    clock.advance()
    clock.enter(Phase.DATA)
    assert began == [Phase.DATA, Phase.AGREEING, Phase.DATA]
    assert clock.now.step == 5 and clock.now.ticks == 4
    assert clock.blocked[Phase.AGREEING] == 2.0 and clock.blocked[Phase.DATA] == 0
    assert clock.seconds[Phase.DATA] > 0 and clock.seconds[Phase.FORWARD] == 0


@pytest.mark.parametrize("value", [-1, 4.9, float("inf"), float("nan")])
def test_a_limit_too_short_to_be_kept_is_refused(value: float) -> None:
    assert TrainConfig(watchdog=0).watchdog == 0
    with pytest.raises(UserError, match=r"train\.watchdog is .*; needed: 5 s or more, or 0"):
        TrainConfig(watchdog=value)


def arguments(shards: Path, folder: Path, stage: int, *overrides: str) -> list[str]:
    """Of a run in FOLDER/run."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return [
        *("--shards", str(shards), "--output", str(folder / "run"), "--recipe", str(recipe)),
        *("--deepspeed_config", str(ROOT / "launch" / "zero" / f"zero{stage}_fp32.json")),
        *(part for override in (f"train.watchdog={LIMIT}", *overrides) for part in ("--set", override)),
    ]


def awaited(what: Callable[[], Any], seconds: float = TIME_LIMIT) -> Any:
    """The first true value of `what()`."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)
    return value


def last_beat(run: Path, rank: int) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads(beat_path(run / "ranks", rank).read_text()))
    return {}


def assert_ended(run: Path, group: int, living: set[int]) -> str:
    """No process is left, stacks and a whole checkpoint are; returns the report."""
    awaited(lambda: not group_members(group), SURVIVAL)
    (stuck,) = (run / "ranks").glob("stuck-*")
    stacks = {int(path.name[5:10]): path.read_text() for path in stuck.glob("rank-*.stacks.txt")}
    assert stacks.keys() == living
    assert all("train_steps" in stack and "watchdog.py" in stack for stack in stacks.values())
    checkpoint, damages = open_checkpoint(run)
    assert checkpoint.state.step >= 4 and not damages
    return (stuck / "report.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_ends_the_job_and_is_named(victim: int, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(launch_ranks, TRAIN, arguments(shards, tmp_path, 2), 2, tmp_path, TIME_LIMIT, EXIT_STUCK)
        awaited(lambda: (run / "checkpoints" / "latest").exists())
        found = awaited(lambda: last_beat(run, victim).get("step", 0) > 4 and last_beat(run, victim))
        pid = found["process"]["pid"]
        group = os.getpgid(pid)
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        output = job.result()
    assert time.monotonic() - stopped < LIMIT + SURVIVAL
    text = assert_ended(run, group, {1 - victim})
    assert text in output and output.count("holds the others up") == 1
    name = rf"rank {victim} \(host \S+, pid {pid}\)"
    reason = r"stopped by a signal .*; the others wait in step \d+, "
    assert re.search(rf"^{name} holds the others up in step \d+, .*: {reason}", text, re.M)
    assert text.count("train_steps") == 2, "the last known stack of the stopped rank as well"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "stage", "ranks", "reason"),
    [
        ("data", 2, 2, "taking data"),
        ("forward", 3, 3, "in forward"),
        ("backward", 1, 2, "in backward"),
        ("forward", 1, 1, "in forward"),
    ],
)
def test_a_stuck_rank_ends_the_job_and_is_named(
    where: str, stage: int, ranks: int, reason: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank; one rank is started without a launcher."""
    run, victim = tmp_path / "run", ranks - 1
    monkeypatch.setenv("HINDER", f"{victim}:{where}:1000:40")
    options = arguments(shards, tmp_path, stage)
    with ThreadPoolExecutor(1) as pool:
        if ranks > 1:
            job = pool.submit(run_ranks, HINDERED, options, ranks, tmp_path, TIME_LIMIT, EXIT_STUCK)
        else:
            job = pool.submit(run_alone, HINDERED, options, tmp_path, TIME_LIMIT, EXIT_STUCK)
        group = os.getpgid(awaited(lambda: last_beat(run, victim))["process"]["pid"])
        output = job.result()
    text = assert_ended(run, group, set(range(ranks)))
    assert text in output
    if ranks > 1:
        assert re.search(rf"^rank {victim} .* holds the others up in step \d+, {reason}: stuck", text, re.M)
        assert text.count("holds the others up") == 1
    else:
        assert re.search(rf"^it is in step \d+, {reason}", text, re.M)
    if where != "data":
        assert "hindered_ranks.py" in text, "the stack shows where"


@pytest.mark.slow
def test_a_long_evaluation_a_long_save_and_a_suspended_job_go_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 needs 10 s to evaluate its two samples, rank 0 12 s to save; each time the other one waits for it."""
    run = tmp_path / "run"
    monkeypatch.setenv("HINDER", "1:evaluate:5,0:save:12:1")
    monkeypatch.setenv("SLOW_FILE", str(tmp_path / "slow"))
    overrides = ["schedule.steps=8", "checkpoint.every=4", "evaluate.at_end=true"]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run_ranks, HINDERED, arguments(shards, tmp_path, 2, *overrides), 2, tmp_path, TIME_LIMIT)
        awaited(lambda: last_beat(run, 1).get("phase") == "evaluating")
        pids = [last_beat(run, rank)["process"]["pid"] for rank in (0, 1)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(LIMIT + 4)  # nothing can be waited for: the job must be away for longer than its limit
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        output = job.result()
    assert (tmp_path / "slow").stat().st_size == 1 << 20 and "mean IoU" in output
    assert not list((run / "ranks").glob("stuck-*"))


@pytest.mark.slow
def test_a_run_folder_that_takes_no_beats_is_trained_in_all_the_same(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        options = arguments(shards, tmp_path, 1, "schedule.steps=1000", "checkpoint.every=0")
        job = pool.submit(run_alone, TRAIN, options, tmp_path, TIME_LIMIT)
        awaited(lambda: last_beat(run, 0))
        (run / "ranks").rename(run / "elsewhere")
        (run / "ranks").write_text("no folder")
        output = job.result()
    assert output.count("warning: rank 0 cannot write where it is") == 1
    assert open_checkpoint(run)[0].state.step == 1000
