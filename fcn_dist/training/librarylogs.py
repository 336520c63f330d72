"""What libraries log and warn of: into a file for each rank; errors are shown as well."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _File(logging.FileHandler):
    """Makes the folder, too, when there is something to keep."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


class _Screen(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard error as it is at the moment: a panel may stand between it and the screen."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """In the block, all that would be logged to standard output or error, and all warnings, are appended to `path`.

    The file is made when there is something to keep.
    """
    handlers: list[logging.Handler] = [_File(path, delay=True), _Screen(logging.ERROR)]
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    named = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    changed = []
    for logger in (root, *named):
        others = [handler for handler in logger.handlers if not _to_screen(handler)]
        ends_here = logger is root or not logger.propagate  # what goes further is handled there
        changed.append((logger, logger.handlers))
        if ends_here and (logger is root or len(others) < len(logger.handlers)):
            others += handlers
        logger.handlers = others
    shows = warnings.showwarning
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = shows
        for logger, before in changed:
            logger.handlers = before
        handlers[0].close()


def _to_screen(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (
        sys.stdout,
        sys.stderr,
        sys.__stdout__,
        sys.__stderr__,
    )
