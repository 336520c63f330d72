"""Locks between processes that end with their owner, and waiting for others only as long as they do something."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fcn_dist.errors import UserError

POLL = 0.05  # seconds; flock has no time limit of its own


class Patience:
    """Waits as long as something changes, and `seconds` more."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._state: object = None
        self._since = time.monotonic()

    def wait(self, state: object) -> bool:
        """Sleep a little; False instead if `state` has been the same for too long."""
        if state != self._state:
            self._state, self._since = state, time.monotonic()
        if time.monotonic() - self._since >= self._seconds:
            return False
        time.sleep(POLL)
        return True


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this descriptor alone, or return False if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(descriptor: int, path: Path, patience: float) -> None:
    """Lock an open file; its holder shows that it is alive by changing its mtime.

    Raises UserError if the mtime stays the same for `patience` seconds.
    """
    waiting = Patience(patience)
    while not try_lock(descriptor):
        if not waiting.wait(os.fstat(descriptor).st_mtime_ns):
            raise UserError(
                f"{path} has been locked for {patience:g} s by a process that does nothing; a process that goes on is "
                f"needed; end it (`fuser {path}` names it), or choose another cache folder with FCN_DIST_CACHE"
            )


def unlock_and_close(descriptor: int) -> None:
    """Give a lock back."""
    # Closing alone would leave the lock to a process that was forked meanwhile and has inherited the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def holding(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made if need be; the rest as `lock`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(descriptor, path, patience)
        os.utime(descriptor)  # those who wait see that it goes from one to the next
        yield
    finally:
        unlock_and_close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has the name by which it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
