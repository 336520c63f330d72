"""Processes forked from one that has threads."""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, IterableDataset

from fcn_dist.data import forking
from fcn_dist.data.forking import ThreadedForkContext
from fcn_dist.data.loaderprocesses import started
from fcn_dist.data.loadersignals import STOP_SIGNALS

FILES = Path("/proc/self/fd")

pytestmark = pytest.mark.timeout(60)


class Group:
    """As a process group: in a cycle, so that only the collector finds it, and its end is for its process alone."""

    def __init__(self, ends: Path) -> None:
        self.ends, self.itself = ends, self

    def __del__(self) -> None:
        with self.ends.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Collecting(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        gc.collect()
        yield os.getpid()


def test_garbage_of_this_process_is_not_collected_in_a_loader_process(tmp_path: Path) -> None:
    ends = tmp_path / "ends"
    gc.disable()
    try:
        Group(ends)
        loader = DataLoader(Collecting(), batch_size=None, num_workers=1, multiprocessing_context=ThreadedForkContext())
        assert list(started(loader)) != [os.getpid()]
        assert not ends.exists()
        gc.collect()
    finally:
        gc.enable()
    assert ends.read_text() == f"{os.getpid()}\n"


def fork_that_hangs(first: int) -> tuple[Callable[[], int], list[int]]:
    """`os.fork` whose first children, `first` of them, do not come out of it, and the numbers of all it has made."""
    fork, made = os.fork, list[int]()

    def hang() -> int:
        if child := fork():
            made.append(child)
        while not child and len(made) < first:
            signal.pause()
        return child

    return hang, made


class Told(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield os.getpid()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_that_reaches_a_loader_process_as_it_begins_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    # A launcher signals a whole group of processes, whatever they are about to do.
    fork = os.fork

    def fork_and_be_told_to_stop() -> int:
        child = fork()
        if not child:
            os.kill(os.getpid(), number)
        return child

    monkeypatch.setattr(os, "fork", fork_and_be_told_to_stop)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = DataLoader(Told(), batch_size=None, num_workers=1, multiprocessing_context=ThreadedForkContext())
    assert list(started(loader)) != [os.getpid()]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_loader_processes_that_hang_in_their_fork_are_forked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, made = fork_that_hangs(2)
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(forking, "BEGINS_WITHIN", 0.1)
    loader = DataLoader(Told(), batch_size=None, num_workers=2, multiprocessing_context=ThreadedForkContext())
    assert sorted(started(loader)) == made[2:] and len(made) == 4


def test_what_hung_is_gone_and_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, made = fork_that_hangs(1)
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(forking, "BEGINS_WITHIN", 0.1)
    open_files = set(FILES.iterdir())
    process = ThreadedForkContext().Process(target=time.time)
    process.start()
    process.join()
    assert process.exitcode == 0 and process.pid == made[1]
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(made[0], 0)
    assert set(FILES.iterdir()) <= open_files  # what other tests left may have been closed meanwhile


def test_it_is_given_up_after_some_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, made = fork_that_hangs(100)
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(forking, "BEGINS_WITHIN", 0.01)
    with pytest.raises(RuntimeError, match="5 times a loader process was forked and did not begin"):
        ThreadedForkContext().Process(target=time.time).start()
    assert len(made) == 5


def test_a_process_that_dies_at_once_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: fork() or os._exit(3))
    process = ThreadedForkContext().Process(target=time.time)
    process.start()
    process.join()
    assert process.exitcode == 3
