"""Work in processes ends cleanly whatever happens to a process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from launching import group_members

from fcn_dist.data.workers import Advance, map_in_processes
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[1]


def _double(job: int, _: Advance) -> int:
    return 2 * job


def test_results_come_in_the_order_of_the_jobs_and_leave_no_process(capfd: pytest.CaptureFixture[str]) -> None:
    for workers in (1, 3):
        assert map_in_processes(_double, list(range(40)), workers, "doubling") == list(range(0, 80, 2))
    assert map_in_processes(_double, [], 2, "nothing") == []
    assert not _workers_alive()
    assert capfd.readouterr().err == "", "no progress where there is no terminal, no complaint of a late worker"


def _workers_alive() -> list[object]:
    return [p for p in multiprocessing.active_children() if "ForkServer" in type(p).__name__]


def _wait_unless_worker(advance: Advance) -> None:
    """In the process that hands out the jobs: go on until a worker's news ends the job."""
    while multiprocessing.parent_process() is None:
        advance(0)


def _pid(job: int, advance: Advance) -> int:
    # The first job, which is this process's own, lasts until workers have done others.
    if job == 0:
        for _ in range(200_000):
            advance(0)
    return os.getpid()


def test_this_process_and_the_workers_share_the_jobs() -> None:
    pids = map_in_processes(_pid, list(range(50)), 3, "sharing")
    assert pids[0] == os.getpid()
    assert len(set(pids)) == 3


STARTED = """
import os, sys
from multiprocessing import forkserver
from pathlib import Path
from fcn_dist.data.workers import start_early
start_early(os.getcwd)
for pid in (os.getpid(), forkserver._forkserver._forkserver_pid):
    print(next(line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigBlk" in line))
"""


def test_an_interrupt_reaches_this_process_alone() -> None:
    done = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, check=True)
    blocked = [bool(int(mask, 16) >> (signal.SIGINT - 1) & 1) for mask in done.stdout.split()]
    assert blocked == [False, True]


def test_an_interrupt_before_workers_are_begun_is_all_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        map_in_processes(_double, [1, 2, 3], 2, "doubling")


def _die(_: int, advance: Advance) -> None:
    _wait_unless_worker(advance)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_becomes_a_clear_error() -> None:
    with pytest.raises(UserError, match="worker process died"):
        map_in_processes(_die, [0, 1, 2, 3], 2, "dying")
    assert not _workers_alive()


def _raise(_: int, advance: Advance) -> None:
    _wait_unless_worker(advance)
    raise UserError("this job is bad")


def test_an_error_in_a_worker_comes_out_as_it_is() -> None:
    with pytest.raises(UserError, match="this job is bad"):
        map_in_processes(_raise, [0, 1, 2, 3], 2, "raising")
    assert not _workers_alive()


def _raise_here(job: int, _: Advance) -> None:
    if multiprocessing.parent_process() is None:
        raise UserError("this job is bad")


def test_an_error_in_this_process_ends_the_workers() -> None:
    with pytest.raises(UserError, match="this job is bad"):
        map_in_processes(_raise_here, [0, 1, 2, 3], 3, "raising")
    assert not _workers_alive()


def _interrupt_parent(_: int, advance: Advance) -> None:
    _wait_unless_worker(advance)
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    os.kill(parent.pid, signal.SIGINT)


@pytest.mark.timeout(30)
def test_an_interrupt_ends_the_workers_and_does_not_hang() -> None:
    with pytest.raises(KeyboardInterrupt):
        map_in_processes(_interrupt_parent, list(range(2000)), 2, "interrupting")
    assert not _workers_alive()


def test_progress_is_shown_with_rate_and_time_left_on_a_terminal_alone(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(
        textwrap.dedent(
            """
            from fcn_dist.progress import count_progress

            with count_progress() as progress:
                task = progress.add_task("packing", total=4000)
                for _ in range(200):
                    progress.advance(task, 10)
                    progress.refresh()
            """
        )
    )
    here = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert here.stdout == here.stderr == ""
    terminal, end = os.openpty()
    with subprocess.Popen([sys.executable, script], stderr=end, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(end)
        shown = b""
        with suppress(OSError):  # as the other end closes
            while block := os.read(terminal, 4096):
                shown += block
        assert process.wait(60) == 0
    os.close(terminal)
    for words in (b"packing", b"2000/4000", b"/s", b"0:00:"):
        assert words in shown, shown[-500:]


def test_workers_end_in_the_midst_of_a_job_once_their_parent_is_dead(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        textwrap.dedent(
            """
            from pathlib import Path

            from fcn_dist.data.workers import map_in_processes

            def endless(job, advance):
                Path(f"{job}.begun").touch()
                while True:
                    advance(1)

            if __name__ == "__main__":
                map_in_processes(endless, ["a", "b", "c"], 3, "endless")
            """
        )
    )
    with subprocess.Popen([sys.executable, "endless.py"], cwd=tmp_path, start_new_session=True) as process:
        try:
            _until(lambda: len(list(tmp_path.glob("*.begun"))) == 3)
            process.kill()
            process.wait(30)
            _until(lambda: not group_members(process.pid))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it has not come to it"
