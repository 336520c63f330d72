"""The node cache: a remote file in, a whole and hash-checked local copy out, fetched once for all processes of a node.

    <dir>/lock                  held while sizes are added up, copies are removed, and a download gets its last name
    <dir>/ab/abcd...            a copy, named by the SHA-256 of its bytes; its mtime says when it was last used
    <dir>/ab/abcd....partial    a download under way: as long as the file from the start, locked by who writes it

Names of content cannot collide, so sets, URLs and jobs may share a folder. Locks are `flock`s: they end with their
owner however it ends, and a partial file that nobody has locked is rubbish. The folder should be on a local disk.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fcn_dist.addresses import shown_url
from fcn_dist.data.flocks import Patience, holding, is_at, lock, unlock_and_close
from fcn_dist.data.remote.cachespace import PARTIAL, allocate, make_room, usable
from fcn_dist.data.remote.urls import Retries, read_blocks
from fcn_dist.errors import UserError
from fcn_dist.files import default_cache_dir
from fcn_dist.sizes import parse_size, show_size

RECENCY = 5.0  # seconds between two notes that a copy is in use, over all processes
# Well above the time that a client may spend on one block before it gives up, and the longest wait before the next try:
# by then a downloader that lives has shown it.
PATIENCE = 600.0
DEFAULT_LIMIT = "100GB"
TRIES = 2  # of the whole file, if its bytes are wrong


@dataclass(frozen=True)
class RemoteFile:
    """A file as an index states it; ValueError if that cannot be."""

    url: str
    size: int  # bytes
    sha256: str  # 64 small hexadecimal digits

    def __post_init__(self) -> None:
        # The digest becomes a path, and comes from elsewhere.
        if not re.fullmatch("[0-9a-f]{64}", self.sha256) or self.size < 0:
            raise ValueError(f"{self.sha256!r} and {self.size} are no SHA-256 and size of {shown_url(self.url)}")


@dataclass(frozen=True)
class NodeCache:
    """A folder with at most `limit` bytes of whole and partial files, shared by any number of processes.

    Jobs with different limits may share it: each keeps its own whenever it adds a file.
    """

    dir: Path
    limit: int  # bytes
    retries: Retries = field(default_factory=Retries)
    patience: float = PATIENCE  # seconds that another process may do nothing while it is waited for

    def fetch(self, file: RemoteFile) -> Path:
        """Where the copy of `file` lies once it is whole; another job may remove it at any time (see `open`).

        The first to need a file downloads it, and the others wait for it as long as it makes progress; if it fails or
        dies, the next one takes over. Raises UserError if the file cannot be had, if its bytes were not those of its
        digest twice, or if there is no room for it.
        """
        self.open(file).close()
        return self.path(file)

    def open(self, file: RemoteFile) -> BinaryIO:
        """The copy of `file`, fetched if need be, unbuffered and at its start; errors as in `fetch`.

        It can be read to the end even if it is removed from the cache meanwhile.
        """
        with usable(self.dir, file.size):
            while True:
                copy = self._open_copy(file)
                if copy is not None:
                    return copy
                claim = self._claim(file)
                if claim is not None:
                    return self._download(file, claim)

    def discard(self, file: RemoteFile) -> None:
        """Remove the copy of `file`, because it has been found damaged; the next `open` fetches it anew."""
        with usable(self.dir), self._locked():
            self.path(file).unlink(missing_ok=True)

    def path(self, file: RemoteFile) -> Path:
        """Where the copy of `file` lies, if there is one."""
        return self.dir / file.sha256[:2] / file.sha256

    def _open_copy(self, file: RemoteFile) -> BinaryIO | None:
        try:
            copy = self.path(file).open("rb", buffering=0)
        except FileNotFoundError:
            return None
        status = os.fstat(copy.fileno())
        if status.st_size != file.size:  # somebody's hands
            copy.close()
            self.discard(file)
            return None
        if abs(time.time() - status.st_mtime) > RECENCY:
            with suppress(PermissionError):  # another user's
                os.utime(copy.fileno())
        return copy

    def _claim(self, file: RemoteFile) -> int | None:
        """The partial file, opened and locked; None if it was finished or removed while it was waited for."""
        path = self._partial(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, path, self.patience)
            if is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        unlock_and_close(descriptor)
        return None

    def _download(self, file: RemoteFile, descriptor: int) -> BinaryIO:
        """Fill the partial file that is locked, give it its name, and open it; it is removed if that fails."""
        partial = self._partial(file)
        try:
            # Another may have finished between our look and our claim.
            copy = self._open_copy(file)
            if copy is None:
                self._reserve(file, descriptor)
                self._fill(file, descriptor)
                # The blocks were allocated before: after a power cut they could be there, of the right number, empty.
                os.fsync(descriptor)
                with self._locked():
                    partial.replace(self.path(file))
                # Not opened by its name, which another job may have removed by now.
                os.lseek(descriptor, 0, os.SEEK_SET)
                copy = os.fdopen(os.dup(descriptor), "rb", buffering=0)
        finally:
            if is_at(descriptor, partial):  # else that name may be another's download by now
                partial.unlink()
            unlock_and_close(descriptor)
        return copy

    def _reserve(self, file: RemoteFile, descriptor: int) -> None:
        """Give the partial file its length, within the limit."""
        if file.size > self.limit:
            raise UserError(
                f"{shown_url(file.url)} has {show_size(file.size)}, and the cache {self.dir} may hold "
                f"{show_size(self.limit)}; a limit of several such files is needed; raise it"
            )
        os.ftruncate(descriptor, 0)  # of a download that was broken off
        waiting = Patience(self.patience)
        while True:
            with self._locked():
                downloads = make_room(self.dir, file.size, self.limit, self._partial(file))
                if not downloads:
                    allocate(self.dir, descriptor, file.size)
                    return
            os.utime(descriptor)  # for those who wait for us
            if not waiting.wait(downloads):
                raise UserError(
                    f"no room for {shown_url(file.url)} ({show_size(file.size)}) in the cache {self.dir}: "
                    f"{len(downloads)} downloads of other processes that make no progress fill its limit of "
                    f"{show_size(self.limit)}; raise the limit, or end those processes"
                )

    def _fill(self, file: RemoteFile, descriptor: int) -> None:
        for _ in range(TRIES):
            digest, size = hashlib.sha256(), 0
            os.lseek(descriptor, 0, os.SEEK_SET)
            with os.fdopen(descriptor, "wb", closefd=False) as output:
                for block in read_blocks(file.url, file.size, self.retries):
                    output.write(block)
                    digest.update(block)
                    size += len(block)
                    os.utime(descriptor)  # an empty block is a sign of life as well
            if digest.hexdigest() == file.sha256:
                return
        raise UserError(
            f"{shown_url(file.url)} is refused: {TRIES} times its first {size} bytes had the SHA-256 "
            f"{digest.hexdigest()}, and the index states {file.size} bytes with {file.sha256}; upload the file again, "
            "or pack the scenes again"
        )

    def _partial(self, file: RemoteFile) -> Path:
        return self.path(file).with_name(file.sha256 + PARTIAL)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.dir.mkdir(parents=True, exist_ok=True)
        with holding(self.dir / "lock", self.patience):
            yield


def node_cache(cache_dir: str | None = None, limit: str = DEFAULT_LIMIT) -> NodeCache:
    """The cache of these settings; `cache_dir` None is the usual folder. UserError if the limit is no size."""
    return NodeCache(Path(cache_dir) if cache_dir else default_cache_dir(), parse_size(limit))
