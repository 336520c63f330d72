"""Files of a checkpoint on their way to disk: contents in, sizes and hashes of what is durable out."""

import hashlib
import io
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from fcn_dist.checkpoints.commit import WrittenFile
from fcn_dist.checkpoints.records import records_sha256


class Writing:
    """Files that a thread of its own is writing, hashing and flushing to disk."""

    def __init__(self, contents: Mapping[Path, Any], background: bool) -> None:
        """Begin to write; bytes as they are, anything else as torch saves it. All is written on return unless
        `background`.
        """
        self.files: dict[Path, WrittenFile] = {}
        self.failure: Exception | None = None  # why not all is on disk
        self.seconds = 0.0  # that it took
        self._contents = dict(contents)
        self._thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)
        self._thread.start()
        if not background:
            self.wait()

    @property
    def over(self) -> bool:
        """Whether there is no more to wait for."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until all is on disk, or has failed."""
        self._thread.join()

    def _write_all(self) -> None:
        began = time.perf_counter()
        try:
            while self._contents:
                path, content = self._contents.popitem()
                self.files[path] = write_file(path, content)
        except Exception as error:  # told where the ranks agree on what came of it
            self.failure = error
            self._contents.clear()
        self.seconds = time.perf_counter() - began


def write_file(path: Path, content: Any) -> WrittenFile:
    """Write one file and flush it to disk. The hash is of the bytes as they went in: no disk has had them yet."""
    records = None
    try:
        with path.open("xb", buffering=0) as file:
            hashing = _Hashing(file)
            if isinstance(content, bytes):
                hashing.write(content)
            else:
                _save(content, hashing)
                records = records_sha256(path)
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return WrittenFile(hashing.size, hashing.sha256.hexdigest(), records)


def _save(content: Any, file: "_Hashing") -> None:
    try:
        torch.save(content, cast(IO[bytes], file))
    except RuntimeError:
        if file.failure:  # torch says no more than that a position is unexpected
            raise file.failure from None
        raise


class _Hashing:
    """A file that is only appended to."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Append and hash."""
        left = memoryview(data).cast("B")
        self.sha256.update(left)
        self.size += len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.failure = error
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
