"""Standard output and error that work goes on without, when nobody takes what is written any more."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Lasting:
    """A text stream that loses what cannot be written: the terminal is closed, the reader gone, the disk full.

    From the first failure on, all that goes to its file descriptor is lost, also what others write there: what is left
    in a buffer would fail again when the process ends, and take its exit code with it.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name, self._lost = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Characters that the stream does not have become question marks."""
        if self._lost:
            return len(text)
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except BlockingIOError:
            pass  # the reader is slow; what comes next may be taken
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """As far as it can be."""
        if self._lost:
            return
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._lost = True
        with suppress(OSError, ValueError):  # a stream without a descriptor, or a closed one
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        logging.getLogger(__name__).warning("what is written to %s is lost from here on: %s", self._name, error)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, standard output and error are lasting."""
    before = sys.stdout, sys.stderr
    lasting = Lasting(sys.stdout, "standard output"), Lasting(sys.stderr, "standard error")
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()  # while a failure can still be met
        sys.stdout, sys.stderr = before
