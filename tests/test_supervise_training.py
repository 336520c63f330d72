"""`fcn-dist train --ranks 2` on real training: codes, saves and what is left."""

import shlex
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import psutil
import pytest
from jobs import STARTS_WITHIN, RunningJob, running, train_command

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from fcn_dist.reporting.history import again


def supervised(shards: Path, run: Path, *more: str) -> AbstractContextManager[RunningJob]:
    """`fcn-dist train --ranks 2 ...`."""
    arguments = train_command(shards, run, *more)[3:]  # without Python and the script
    return running([sys.executable, "-m", "fcn_dist", "train", "--ranks", "2", *arguments], run)


def ranks(job: RunningJob) -> list[psutil.Process]:
    """By rank; the environment tells a rank from its loader processes, which have that of their rank."""
    found = {}
    for process in map(psutil.Process, job.members()):
        with suppress(psutil.Error):
            environment = process.environ()
            if environment.get("FCN_DIST_RANK_PID") == str(process.pid):
                found[int(environment["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_a_stopped_training_is_saved_and_the_same_command_finishes_it(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with supervised(shards, run, "--auto-resume") as job:
        job.until_step(2)
        assert len(ranks(job)) == 2
        job.process.send_signal(signal.SIGUSR1)
        assert job.ended() == EXIT_REQUEUE, job.output()
    trained = job.lines("train")[-1]["step"]
    assert open_checkpoint(run)[0].state.step == trained
    assert "fcn_dist/" not in job.output(), "a traceback"
    steps = str(trained + 2)
    for _ in range(2):  # the second finds nothing left to do
        with supervised(shards, run, "--auto-resume", "--steps", steps) as job:
            assert job.ended() == 0, job.output()
    assert [line["step"] for line in job.lines("train")] == list(range(1, trained + 3))
    # What was given is on record as it can be given again, there.
    for start in job.lines("start"):
        assert start["folder"] == str(run.parent)
        words = shlex.split(again(start["command"], start["world_size"]))
        assert words[:4] == ["fcn-dist", "train", "--shards", str(shards)] and words[-2:] == ["--ranks", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rank", "launcher", "supervisor"])
def test_nothing_is_left_of_a_training_of_which_a_process_was_killed(target: str, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with supervised(shards, run, "--set", "checkpoint.every=2") as job:
        job.until(lambda: bool(job.lines("checkpoint")))
        processes = [psutil.Process(pid) for pid in job.members()]
        launcher = next(process for process in processes if "deepspeed.launcher.launch" in process.cmdline())
        supervisor = psutil.Process(job.process.pid)
        victim = {"rank": ranks(job)[1], "launcher": launcher, "supervisor": supervisor}[target]
        victim.kill()
        code = job.ended()
    found, _ = open_checkpoint(run)
    trained = job.lines("train")[-1]["step"]
    if target == "rank":
        assert (
            code not in (0, EXIT_REQUEUE, EXIT_USER_ERROR)
            and "fcn-dist: rank 1 on this host ended without" in job.output()
        )
        assert trained - found.state.step <= 4  # a save that was under way may be lost as well
    else:
        assert code == (EXIT_REQUEUE if target == "launcher" else -signal.SIGKILL)
        assert found.state.step == trained


def fcn_dist(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fcn_dist", *arguments]
    variables = {**dict(psutil.Process().environ()), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=STARTS_WITHIN, check=False, env=variables)


@pytest.mark.slow
def test_what_a_user_can_fix_ends_in_2_from_all_ranks(shards: Path, tmp_path: Path) -> None:
    arguments = ["--shards", str(shards), "--output", str(tmp_path / "run"), "--set", "model.wdth=1"]
    done = fcn_dist("train", "--ranks", "2", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("unknown recipe key model.wdth") == 1


def test_more_ranks_than_a_launcher_has_started_cannot_be_asked_for() -> None:
    done = fcn_dist("train", "--ranks", "2", "--shards", "x", "--output", "y", RANK="0", WORLD_SIZE="1")
    assert done.returncode == 2 and "--ranks start ranks, and a launcher has started this one" in done.stderr
    done = fcn_dist("train", "--ranks", "0", "--shards", "x", "--output", "y")
    assert done.returncode == 2 and "at least 1 is needed" in done.stderr


def test_the_help_of_the_command_tells_of_both_parts() -> None:
    done = fcn_dist("train", "--help")
    assert done.returncode == 0 and "--hostfile" in done.stdout and "--auto-resume" in done.stdout
