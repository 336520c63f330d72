"""Stopping real jobs: a signal to any of their processes, and launchers that vanish."""

import os
import signal
import sys
from pathlib import Path

import pytest
from jobs import ENDS_WITHIN, ROOT, RunningJob, journal, running, train_command
from launching import free_port

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.errors import EXIT_REQUEUE

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]


def stopped_and_saved(job: RunningJob, within: float = ENDS_WITHIN) -> int:
    """The exit code; everything trained is in a checkpoint, and no process is left."""
    code = job.ended(within)
    trained = [line["step"] for line in job.lines("train")]
    found, damages = open_checkpoint(job.run)
    assert (found.state.step, damages) == (trained[-1], []), job.output()
    assert trained == list(range(1, trained[-1] + 1))
    assert "fcn_dist/" not in job.output(), "a traceback"
    return code


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_without_a_launcher_saves_and_asks_to_be_started_again(
    number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    with running(train_command(shards, tmp_path / "run"), tmp_path / "run") as job:
        job.until_step(2)
        job.process.send_signal(number)
        job.process.send_signal(number)  # a second one does no harm
        assert stopped_and_saved(job) == EXIT_REQUEUE
    assert f"rank 0: {number.name}" in job.output() and "--resume" in job.output()


@pytest.mark.slow
def test_nohup_is_heeded(shards: Path, tmp_path: Path) -> None:
    command = ["nohup", *train_command(shards, tmp_path / "run", "--steps", "60")]
    with running(command, tmp_path / "run") as job:
        job.until_step(2)
        job.process.send_signal(signal.SIGHUP)
        assert job.ended() == 0, job.output()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "number"), [(0, signal.SIGUSR1), (1, signal.SIGTERM)])
def test_a_signal_to_one_rank_stops_all_at_one_step(
    target: int, number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    with running(train_command(shards, tmp_path / "run", ranks=2), tmp_path / "run") as job:
        job.until_step(2)
        job.ranks()[target].send_signal(number)
        assert stopped_and_saved(job) == EXIT_REQUEUE
    assert f"rank {target}: {number.name}" in job.output()
    assert job.output().count("stopped after step") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_although_it_reaches_the_loaders_as_well(
    number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    with running(train_command(shards, tmp_path / "run", ranks=2), tmp_path / "run") as job:
        job.until_step(2)
        os.killpg(job.process.pid, number)
        assert stopped_and_saved(job) != 0


@pytest.mark.slow
def test_a_signal_to_the_loader_processes_alone_is_passed_over(shards: Path, tmp_path: Path) -> None:
    with running(train_command(shards, tmp_path / "run", "--steps", "60"), tmp_path / "run") as job:
        job.until_step(2)
        (rank,) = job.ranks()
        (loader,) = rank.children()
        for number in SIGNALS:
            loader.send_signal(number)
        assert job.ended() == 0
    assert [line["step"] for line in journal(job.run, "train")] == list(range(1, 61))


@pytest.mark.slow
def test_deepspeeds_launcher_child_passes_sigterm_on_and_the_state_is_saved(shards: Path, tmp_path: Path) -> None:
    """It signals the ranks one after another, the loaders of a rank before the rank."""
    with running(train_command(shards, tmp_path / "run", ranks=2), tmp_path / "run") as job:
        job.until_step(2)
        job.launcher().terminate()
        assert stopped_and_saved(job) == 1  # its own code, whatever the ranks' is


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "number"),
    [
        *(("command", number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)),
        *(("launcher", number) for number in (signal.SIGUSR1, signal.SIGKILL)),  # it passes SIGTERM on, as above
    ],
)
def test_ranks_whose_launcher_vanishes_save_and_end(
    target: str, number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    with running(train_command(shards, tmp_path / "run", ranks=2), tmp_path / "run") as job:
        job.until_step(2)
        (job.process if target == "command" else job.launcher()).send_signal(number)
        code = stopped_and_saved(job)
    assert "the launcher has vanished" in job.output()
    # DeepSpeed's command says 0 when its child was killed: what `fcn-dist train` is for.
    assert code == (-number if target == "command" else 0)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_leaves_what_was_committed(shards: Path, tmp_path: Path) -> None:
    command = train_command(shards, tmp_path / "run", "--set", "checkpoint.every=2", ranks=2)
    with running(command, tmp_path / "run") as job:
        job.until(lambda: bool(job.lines("checkpoint")))
        job.ranks()[1].kill()
        assert job.ended() != 0
        assert open_checkpoint(job.run)[0].state.step >= 2
    assert "error (rank 0 on " in job.output() and "another rank is gone" in job.output()
    assert "fcn_dist/" not in job.output(), "a traceback"


@pytest.mark.slow
def test_an_exception_on_one_rank_keeps_its_traceback_and_ends_all(shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from fcn_dist.commands.entry import run_script\n"
        "from fcn_dist.training import loop\n"
        "to_device = loop.to_device\n"
        "def broken(batch, *rest):\n"
        "    if os.environ['RANK'] == '1' and 12 in batch.positions or 14 in batch.positions:\n"
        "        raise KeyError('a bug')\n"
        "    return to_device(batch, *rest)\n"
        "loop.to_device = broken\n"
        "sys.exit(run_script('train'))\n"
    )
    command = train_command(shards, tmp_path / "run", "--set", "checkpoint.every=1", ranks=2, script=script)
    with running(command, tmp_path / "run") as job:
        assert job.ended() == 1, job.output()
    assert "KeyError: 'a bug'" in job.output()
    assert open_checkpoint(job.run)[0].state.step in (2, 3)  # what was being written may be lost with the rank
    assert job.output().count("Traceback") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_is_stopped_saved_and_run_to_the_end(number: signal.Signals, shards: Path, tmp_path: Path) -> None:
    """It passes SIGTERM on to all ranks at once; SIGUSR1 ends it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    run = tmp_path / "run"
    with running([*torchrun, free_port(), *train_command(shards, run, "--auto-resume")[2:]], run) as job:
        job.until_step(2)
        job.process.send_signal(number)
        assert stopped_and_saved(job) != 0
    last = journal(run, "train")[-1]["step"] + 2
    more = train_command(shards, run, "--auto-resume", "--steps", str(last))[2:]
    with running([*torchrun, free_port(), *more], run) as job:
        assert job.ended() == 0, job.output()
    assert [line["step"] for line in journal(run, "train")] == list(range(1, last + 1))


@pytest.mark.slow
def test_a_stop_before_the_first_step_saves_nothing_and_the_same_command_begins(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train_command(shards, run, "--auto-resume", "--steps", "3")
    with running(command, run) as job:
        job.until(lambda: (run / ".lock").exists())
        job.process.terminate()
        assert job.ended() == EXIT_REQUEUE, job.output()
    assert "there is no checkpoint yet" in job.output()
    with running(command, run) as job:
        assert job.ended() == 0, job.output()
    assert [line["step"] for line in journal(run, "train")] == [1, 2, 3]
    with running(command, run) as job:  # requeued once more: nothing is left to do
        assert job.ended() == 0
    assert "trained to its last step, 3, already" in job.output()
