"""Signals as something to wait for: handlers only note them, and wake up whoever waits."""

import os
import select
import signal
from types import FrameType

# The terminal that goes away asks for a stop as well, unless nohup has said otherwise.
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Signals:
    """A context in which signals that ask for a stop are collected, and any end of a child wakes up `wait`."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> "Signals":
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._before = {
            signum: signal.signal(signum, self._note)
            for signum in (*STOPS, signal.SIGCHLD)
            if not (signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read_end)
        os.close(self._write_end)

    def wait(self, descriptors: list[int], seconds: float) -> list[int]:
        """Wait until a descriptor can be read, a signal comes or the time is over; returns readable descriptors."""
        readable, _, _ = select.select([self._read_end, *descriptors], [], [], seconds)
        if self._read_end in readable:
            os.read(self._read_end, 4096)
        return [descriptor for descriptor in readable if descriptor != self._read_end]

    def _note(self, signum: int, _: FrameType | None) -> None:
        if signum != signal.SIGCHLD:
            self.received.append(signum)
