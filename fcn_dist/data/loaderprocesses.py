"""The processes of a DataLoader: its items in and out, and an EarlyEnd once one of its processes was killed."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import current_thread, main_thread
from typing import TypeVar

from fcn_dist.errors import EXIT_REQUEUE, EarlyEnd
from fcn_dist.ranks import Rank

Item = TypeVar("Item")


def started(loader: Iterable[Item]) -> Iterator[Item]:
    """Start the processes of `loader` and yield its items, looking before each whether all processes live.

    Raises EarlyEnd if one was killed: what it had read is lost, but not what was trained, so that starting again helps.
    RuntimeError if one ended in another way.
    """
    before = multiprocessing.active_children()
    items = _iterator(loader)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    while True:
        _check(processes)
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError:
            _check(processes)  # torch has waited in vain, and names a process without saying what became of it
            raise
        yield item


@contextmanager
def ended_with_the_block() -> Iterator[None]:
    """Kill the loader processes that were started in the block and still live at its end: nothing they do is wanted.

    Left to themselves, multiprocessing would send each a SIGTERM at exit and wait for its end. But signals of one kind
    do not queue: where a launcher's SIGTERM, which a loader process passes over, has not been taken yet, this one is
    lost in it, and the wait never ends.
    """
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()


def _iterator(loader: Iterable[Item]) -> Iterator[Item]:
    """`iter(loader)`, without the handler by which torch raises an error wherever this process is at that moment.

    In the midst of a collective it would leave the other ranks waiting.
    """
    if current_thread() is not main_thread():
        return iter(loader)  # torch sets none here
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _check(processes: list[BaseProcess]) -> None:
    codes = [process.exitcode for process in processes]
    for code in codes:
        if code == -signal.SIGKILL:  # the kernel out of memory, or an administrator; anything else is a bug
            raise EarlyEnd(
                f"one of the {len(processes)} loader processes of rank {Rank.from_environment().index} was killed by "
                "SIGKILL, most likely for want of memory; start again (training goes on from its "
                "last checkpoint with --resume), and if it comes again, lower the number of workers or ask for more "
                "memory",
                EXIT_REQUEUE,
            )
        if code:
            raise RuntimeError(f"a loader process ended with exit code {code}")
