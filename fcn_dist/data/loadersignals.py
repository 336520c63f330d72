"""Signals in loader processes: a stop is the rank's to answer, and its loader must live until it has."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def holding_back_stops() -> Iterator[None]:
    """Within the block, what asks this thread to stop waits. So it does in a process that is forked there, for good.

    Such a process would otherwise end by a signal that reaches it before `leave_stopping_to_the_parent` is called.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_stopping_to_the_parent() -> None:
    """Pass over whatever asks this process to stop, unless it comes from its parent.

    Launchers signal a rank's children before the rank itself; a terminal's Ctrl-C reaches all of them. The parent's
    own SIGTERM, by which multiprocessing ends what has not ended by itself, still does.
    """
    # Blocked in this thread and in those it starts, so that the one below is the only one to take them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_take_signals, daemon=True).start()


def _take_signals() -> None:
    while True:
        info = signal.sigwaitinfo(STOP_SIGNALS)
        if info.si_pid == os.getppid():
            os._exit(0)
