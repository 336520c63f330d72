"""The supervisor around DeepSpeed's real launcher: signals and kills at each process of a job, and what comes of it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fcn_dist.errors import EXIT_DIVERGED, EXIT_REQUEUE, EXIT_STUCK, EXIT_USER_ERROR
from fcn_dist.outcome import combine

TESTS = Path(__file__).resolve().parent
STAND_IN = TESTS / "stand_in_rank.py"
START_LIMIT = 120.0  # seconds for DeepSpeed's launcher to start stand-ins
END_LIMIT = 30.0  # seconds in which nothing may be left of a job that lost its launcher, as users are promised
GRACE = 5.0


@dataclass
class Job:
    """A supervised job of two stand-ins."""

    supervisor: subprocess.Popen[bytes]
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """Everything under the supervisor at this moment, and itself."""
        top = psutil.Process(self.supervisor.pid)
        return [top, *top.children(recursive=True)]

    def find(self, what: str) -> psutil.Process:
        """The supervisor, the runner, the launcher, the agent, or the rank of a number."""
        if what == "supervisor":
            return psutil.Process(self.supervisor.pid)
        if what.isdigit():
            return psutil.Process(int((self.folder / f"{what}.pids").read_text().split()[0]))
        names = {"runner": "deepspeed.launcher.runner", "launcher": "deepspeed.launcher.launch"}
        module = names.get(what, f"fcn_dist.launching.{what}")
        return next(process for process in self.processes() if module in process.cmdline())

    def heard(self, rank: int) -> list[int]:
        """The signals that a rank heard before it left."""
        return [int(word) for word in (self.folder / f"{rank}.signals").read_text().split()]

    def output(self) -> str:
        """All that was printed."""
        return (self.folder / "output").read_text()


def until(condition: Callable[[], object], limit: float, what: str) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not in {limit:g} s: {what}"
        time.sleep(0.05)


@contextmanager
def running(folder: Path, *arguments: str, grace: float = GRACE, wait: bool = True) -> Iterator[Job]:
    """A job whose ranks have begun, if `wait`; nothing of it is left in any case."""
    script = [str(grace), str(STAND_IN), str(folder), *arguments]
    known: dict[int, psutil.Process] = {}
    with (folder / "output").open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, str(TESTS / "supervise_script.py"), "2", *script],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    job = Job(supervisor, folder)
    try:
        until(
            lambda: (not wait) or supervisor.poll() is not None or all((folder / f"{n}.pids").exists() for n in (0, 1)),
            START_LIMIT,
            "two ranks",
        )
        assert supervisor.poll() is None, job.output()
        known |= {process.pid: process for process in job.processes()}
        yield job
    finally:
        with suppress(psutil.NoSuchProcess):
            known |= {process.pid: process for process in job.processes()}
        for process in known.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        supervisor.wait()


def ended(job: Job, processes: list[psutil.Process], limit: float = END_LIMIT) -> int:
    """The exit code of the supervisor, once it and everything it started is gone."""
    # A process that init has not yet taken away is gone as well.
    until(
        lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes),
        limit,
        f"the end of {[p for p in processes if p.is_running()]}\n{job.output()}",
    )
    assert not list(Path("/tmp").glob(f"{job_folder(job)}*"))
    return job.supervisor.wait(10)


def job_folder(job: Job) -> str:
    """The name of the job's folder, which is in the agent's command line."""
    return (job.folder / "job").read_text() if (job.folder / "job").exists() else "fcn-dist-none"


def remember_job_folder(job: Job) -> None:
    command = job.find("agent").cmdline()
    (job.folder / "job").write_text(Path(command[command.index("fcn_dist.launching.agent") + 1]).name)


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 76])
def test_the_code_that_ranks_end_with_is_the_job_s(code: int, tmp_path: Path) -> None:
    with running(tmp_path) as job:
        processes = job.processes()
        (tmp_path / "partial").write_text(str(code))
        (tmp_path / "partial").rename(tmp_path / "finish")
        assert ended(job, processes) == code
        assert f"rank 0 ends with {code}" in job.output()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_command_reaches_each_rank_once_and_ends_in_75(signum: int, tmp_path: Path) -> None:
    with running(tmp_path) as job:
        remember_job_folder(job)
        processes = job.processes()
        job.supervisor.send_signal(signum)
        job.supervisor.send_signal(signum)  # a second one does no harm
        assert ended(job, processes) == EXIT_REQUEUE
        passed_on = signal.SIGTERM if signum == signal.SIGHUP else signum
        # The launcher adds a SIGTERM of its own for a rank that still saves when the other is done.
        assert job.heard(0)[0] == passed_on and job.heard(1)[0] == passed_on
        assert len(job.heard(0) + job.heard(1)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "signum"),
    [
        ("runner", signal.SIGKILL),
        ("runner", signal.SIGTERM),
        ("launcher", signal.SIGKILL),
        ("launcher", signal.SIGTERM),
        ("launcher", signal.SIGUSR1),
        ("0", signal.SIGKILL),
        ("1", signal.SIGUSR1),
    ],
)
def test_ranks_that_lose_their_launcher_or_each_other_save_and_leave(target: str, signum: int, tmp_path: Path) -> None:
    with running(tmp_path) as job:
        remember_job_folder(job)
        processes = job.processes()
        job.find(target).send_signal(signum)
        assert ended(job, processes) == EXIT_REQUEUE
        for rank in range(2):
            if (str(rank), signal.SIGKILL) != (target, signum):
                assert job.heard(rank), f"rank {rank} saved nothing"


@pytest.mark.slow
def test_ranks_of_a_killed_supervisor_save_and_leave(tmp_path: Path) -> None:
    with running(tmp_path) as job:
        remember_job_folder(job)
        processes = job.processes()
        job.supervisor.kill()
        assert ended(job, processes) == -signal.SIGKILL
        assert job.heard(0) == job.heard(1) == [signal.SIGTERM]


@pytest.mark.slow
def test_ranks_whose_agent_was_killed_save_and_leave(tmp_path: Path) -> None:
    with running(tmp_path) as job:
        remember_job_folder(job)
        processes = job.processes()
        job.find("agent").kill()
        assert ended(job, processes) == EXIT_REQUEUE
        assert job.heard(0) == job.heard(1) == [signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "code"), [("supervisor", -signal.SIGKILL), ("launcher", 1), ("1", 1)])
def test_ranks_that_hear_nothing_are_killed(target: str, code: int, tmp_path: Path) -> None:
    with running(tmp_path, "deaf") as job:
        remember_job_folder(job)
        processes = job.processes()
        job.find(target).kill()
        assert ended(job, processes) == code


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_that_is_stopped_before_its_ranks_are_there_leaves_nothing(signum: int, tmp_path: Path) -> None:
    with running(tmp_path, wait=False) as job:
        until(lambda: "deepspeed.launcher.runner" in str([p.cmdline() for p in job.processes()]), 30, "a runner")
        runner = job.find("runner")
        runner.suspend()  # or the ranks might be there before the signal
        remember_job_folder(job)
        processes = job.processes()
        job.supervisor.send_signal(signum)
        runner.resume()
        assert ended(job, processes) == (EXIT_REQUEUE if signum == signal.SIGTERM else -signum)
        assert not (tmp_path / "0.signals").exists()


def test_a_job_has_finished_only_if_rank_0_says_so() -> None:
    assert combine({0: 0, 1: 0}, 0) == 0
    assert combine({0: 0}, 247) == 0  # the others had nothing left to do
    for outcomes in ({}, {1: 0}, {0: 1, 1: 0}):
        assert combine(outcomes, 0) == 1
        assert combine(outcomes, -9) == 1
        assert combine(outcomes, 247) == 247


def test_what_a_rank_says_of_its_own_end_is_worth_more_than_what_others_die_of() -> None:
    for code in (EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_STUCK, EXIT_REQUEUE):
        assert combine({1: code}, 1) == code
        assert combine({0: 1, 1: code}, 0) == code
    assert combine({0: EXIT_REQUEUE, 1: EXIT_STUCK}, 1) == EXIT_STUCK
