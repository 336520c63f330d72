"""Work in processes ends cleanly whatever happens to a process."""

import multiprocessing
import os
import signal

import pytest

from fcn_dist.data.workers import map_in_processes
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)


def _double(job: int) -> int:
    return 2 * job


def test_results_come_in_the_order_of_the_jobs_and_leave_no_process(capfd: pytest.CaptureFixture[str]) -> None:
    for workers in (1, 3):
        assert map_in_processes(_double, list(range(40)), workers, "doubling") == list(range(0, 80, 2))
    assert map_in_processes(_double, [], 2, "nothing") == []
    assert not _workers_alive()
    assert capfd.readouterr().err == "", "no progress where there is no terminal, no complaint of a late worker"


def _workers_alive() -> list[object]:
    return [p for p in multiprocessing.active_children() if "ForkServer" in type(p).__name__]


def _die(job: int) -> int:
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_a_worker_that_is_killed_becomes_a_clear_error() -> None:
    with pytest.raises(UserError, match="worker processes died"):
        map_in_processes(_die, [0, 1, 2, 3], 2, "dying")


def _raise(job: int) -> int:
    if job == 2:
        raise UserError("job 2 is bad")
    return job


def test_an_error_in_a_worker_comes_out_as_it_is() -> None:
    with pytest.raises(UserError, match="job 2 is bad"):
        map_in_processes(_raise, [0, 1, 2, 3], 2, "raising")


def _interrupt_parent(job: int) -> int:
    parent = multiprocessing.parent_process()
    assert parent is not None
    if job == 2 and parent.pid is not None:
        os.kill(parent.pid, signal.SIGINT)
    return job


@pytest.mark.timeout(30)
def test_an_interrupt_ends_the_workers_and_does_not_hang() -> None:
    with pytest.raises(KeyboardInterrupt):
        map_in_processes(_interrupt_parent, list(range(2000)), 2, "interrupting")
    assert not _workers_alive()
