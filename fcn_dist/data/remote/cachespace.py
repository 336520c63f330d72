"""The room of a cache folder: what lies in it, and what must go so that one more file fits.

All but `usable` is for the holder of the cache's lock. Only names that the cache gives are counted and removed; other
files may lie in the folder. Unlinking is safe for those who have a copy open: it stays readable until they close it.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fcn_dist.data.flocks import try_lock, unlock_and_close
from fcn_dist.errors import UserError
from fcn_dist.sizes import show_size

PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT)


class Entry(NamedTuple):
    """One file of the cache."""

    path: Path
    size: int
    mtime_ns: int  # of a whole copy: its last use; of a download: its last sign of life

    @property
    def is_partial(self) -> bool:
        """Whether it is, or was, a download under way."""
        return self.path.suffix == PARTIAL


def entries(cache_dir: Path) -> list[Entry]:
    """All files of the cache, those used longest ago first."""
    found = []
    for path in cache_dir.glob("[0-9a-f][0-9a-f]/*"):
        if re.fullmatch(rf"[0-9a-f]{{64}}({re.escape(PARTIAL)})?", path.name):
            with suppress(FileNotFoundError):  # a download that failed meanwhile
                status = path.stat()
                found.append(Entry(path, status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda entry: entry.mtime_ns)


def make_room(cache_dir: Path, needed: int, limit: int, own: Path) -> set[Entry]:
    """Remove what nobody downloads any more, and the oldest copies, until `needed` more bytes are within `limit`.

    Returns the downloads of others that leave no room even without any copy, in which case all copies stay; an empty
    set once there is room. `own` is not counted.
    """
    others = [entry for entry in entries(cache_dir) if entry.path != own]
    partials = [entry for entry in others if entry.is_partial]
    # Without a size, a download waits for room itself.
    downloads = {entry for entry in partials if not _remove_abandoned(entry.path) and entry.size}
    copies = [entry for entry in others if not entry.is_partial]
    used = sum(entry.size for entry in downloads)
    if used + needed > limit:
        return downloads
    used += sum(entry.size for entry in copies)
    for copy in copies:
        if used + needed <= limit:
            break
        copy.path.unlink(missing_ok=True)
        used -= copy.size
    return set()


def allocate(cache_dir: Path, descriptor: int, size: int) -> None:
    """Give an open empty file its blocks on the disk; other programs may have left less room than the limit allows.

    Raises OSError if the disk is full even without any copy.
    """
    while size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            os.ftruncate(descriptor, 0)
            if error.errno not in FULL or not _remove_oldest(cache_dir):
                raise


@contextmanager
def usable(cache_dir: Path, needed: int = 0) -> Iterator[None]:
    """Turn what goes wrong with the local disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"the disk of the cache {cache_dir} is full: {show_size(needed)} are needed, "
                f"{show_size(shutil.disk_usage(cache_dir).free)} are free and no other copy can go; free some, or "
                "choose a folder on another disk with FCN_DIST_CACHE"
            ) from error
        raise UserError(
            f"the cache {cache_dir} cannot be used ({error}); a folder that this account can write is needed; choose "
            "one with FCN_DIST_CACHE"
        ) from error


def _remove_abandoned(path: Path) -> bool:
    """Remove a partial file unless somebody writes it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not try_lock(descriptor):
            return False
        # Who opened it meanwhile, to take it over, sees after locking that the name is gone.
        path.unlink(missing_ok=True)
        return True
    finally:
        unlock_and_close(descriptor)


def _remove_oldest(cache_dir: Path) -> bool:
    for entry in entries(cache_dir):
        if not entry.is_partial:
            entry.path.unlink(missing_ok=True)
            return True
    return False
