"""The pairs of one shard in; one tar with its member records beside it out, the same bytes on every run."""

import hashlib
import os
import tarfile
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np

from fcn_dist.data.members import member_dtype, members_path
from fcn_dist.data.scenes.pairs import PackedPair
from fcn_dist.data.shard import Shard
from fcn_dist.files import replacing

IMAGE_SUFFIX, MASK_SUFFIX = ".jpg", ".png"
_FLUSH_EVERY = 2**23  # bytes


class TarShard:
    """Writes one tar, and keeps account of it. `flusher` flushes to disk beside the work."""

    def __init__(self, file: BinaryIO, flusher: Executor) -> None:
        self._file, self._flusher = file, flusher
        self._hash = hashlib.sha256()
        self._size = self._flushed = 0
        self._flush: Future[None] | None = None
        self._records: list[tuple[bytes | int, ...]] = []

    def add(self, key: str, pair: PackedPair) -> None:
        """Write both members of a sample."""
        image_at = self._add_member(key + IMAGE_SUFFIX, pair.image)
        mask_at = self._add_member(key + MASK_SUFFIX, pair.mask)
        self._records.append((key.encode(), *image_at, *mask_at, *pair.labels.shape))
        # The disk works while the next images are decoded, so that little is left to flush at the end.
        if self._size - self._flushed >= _FLUSH_EVERY and (self._flush is None or self._flush.done()):
            self._end_flush()
            self._file.flush()
            self._flushed = self._size
            self._flush = self._flusher.submit(os.fdatasync, self._file.fileno())

    def _end_flush(self) -> None:
        if self._flush:
            self._flush.result()  # raises what went wrong, which a later flush need not meet again

    def finish(self, path: Path) -> Shard:
        """End the tar and write the member records of what will be the shard `path`."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._size % tarfile.RECORDSIZE))
        self._end_flush()
        key_bytes = max(len(key) for key, *_ in self._records if isinstance(key, bytes))
        with replacing(members_path(path)) as partial:
            with partial.open("wb") as file:
                np.save(file, np.array(self._records, member_dtype(key_bytes)), allow_pickle=False)
            data = partial.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        return Shard(path, len(self._records), self._size, self._hash.hexdigest(), len(data), digest)

    def _add_member(self, name: str, payload: bytes) -> tuple[int, int, int]:
        """Offset, size and CRC-32 of the payload."""
        info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no names, mode 0644
        info.size = len(payload)
        # PAX headers hold names of any length in any script.
        self._write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self._size
        self._write(payload)
        self._write(bytes(-self._size % tarfile.BLOCKSIZE))
        return offset, len(payload), crc32(payload)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)
