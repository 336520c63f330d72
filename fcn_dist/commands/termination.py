"""SIGTERM for commands that write under temporary names: they remove those before they end."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM has come."""


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM is an exception; after it the process ends by the signal, as if nothing had held it up.

    Not for what waits for other ranks: no exception is raised there until they answer.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not ours:
        yield
        return

    def handler(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it where it is
        raise Terminated

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Terminated:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
