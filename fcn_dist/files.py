"""Files that are whole or not there: written under another name, flushed to disk, renamed."""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from fcn_dist.errors import UserError

FLUSHED_EVERY = 0.1  # seconds; each time costs, as a file that grows has its size written, too
# What keeps a file from being read and is nothing of the file's own.
OBSTACLES = {errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}


def obstacle_in(error: BaseException) -> int | None:
    """The number of the obstacle that an error tells of; None if of none. Torch's errors quote the system's words."""
    if isinstance(error, OSError):
        return error.errno if error.errno in OBSTACLES else None
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return next((number for number in OBSTACLES if os.strerror(number) in str(error)), None)


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, else remove it.

    Without `flush` a power failure can leave the old file, or one that is empty or cut; a killed process cannot.
    """
    # Processes on several machines can have one number, and write to one folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with naming(path):
            yield partial
            if flush:
                sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if flush:
        sync(path.parent)


def check_place(path: Path) -> None:
    """Raise UserError unless a file can be put at `path`: new, or in place of one. Devices and the like stay."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{path} is {kind}; the name of a file is needed; choose another")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder to write {path.name} into; create it, or choose another")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block that names no file is of `path`: a write to an open file does not say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def flushing(path: Path) -> Iterator[None]:
    """Flush to disk what the block writes to the file, all along: at its end little is left to wait for.

    Raises OSError if the disk failed: it tells so once, to whoever had the file open.
    """
    with path.open("ab") as file, ThreadPoolExecutor(1) as pool:
        over = Event()
        flushed = pool.submit(_flush_until, over, file.fileno())
        try:
            yield
        finally:
            over.set()
        flushed.result()


def _flush_until(over: Event, descriptor: int) -> None:
    while not over.wait(FLUSHED_EVERY):
        os.fdatasync(descriptor)
    os.fsync(descriptor)


def write_text(path: Path, text: str, flush: bool = True) -> None:
    """Write `text` so that a reader finds the old file or the new one, never a part; `flush` as `replacing`."""
    with replacing(path, flush) as partial:
        partial.write_text(text)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_cache_dir() -> Path:
    """FCN_DIST_CACHE, else fcn-dist in XDG_CACHE_HOME, else in ~/.cache; UserError if there is no home."""
    if chosen := os.environ.get("FCN_DIST_CACHE"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "fcn-dist"
    try:
        return Path.home() / ".cache" / "fcn-dist"
    except RuntimeError as error:
        raise UserError(
            "this account has no home for the cache of remote files; a folder is needed; set FCN_DIST_CACHE"
        ) from error
