"""One shard of a set: its single samples out. A remote one is fetched when it is first needed, once a node."""

import hashlib
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.members import member_key, members_path, parse_members
from fcn_dist.data.remote.cache import NodeCache, RemoteFile
from fcn_dist.errors import UserError
from fcn_dist.files import sha256

INDEX_NAME = "index.json"


class DamagedSample(UserError):
    """A sample is not what was packed. The message names shard, key and reason."""

    def __init__(self, key: str, reason: str, shard: str = "") -> None:
        super().__init__(key, reason, shard)
        self.key, self.reason, self.shard = key, reason, shard

    def __str__(self) -> str:
        where = f"{self.shard}: " if self.shard else ""
        return (
            f"{where}sample {self.key!r}: {self.reason}; restore the shard from a copy, or pack the scenes again "
            "(shards/verify.py finds all that is wrong)"
        )


class Sample(NamedTuple):
    """One packed pair, still encoded."""

    key: str
    image: bytes  # JPEG, RGB
    mask: bytes  # PNG, mode L, raw labels


@dataclass(frozen=True)
class Shard:
    """One tar file as the index lists it."""

    path: Path  # in a remote set, only its last part means something
    num_samples: int
    size: int
    sha256: str
    members_size: int  # bytes of the file beside it with one record a sample
    members_sha256: str
    folder_url: str = ""  # of a remote set
    cache: NodeCache | None = None  # of a remote set

    @property
    def name(self) -> str:
        """How errors call it: its path or URL."""
        return f"{self.folder_url}/{self.path.name}" if self.cache else str(self.path)

    @property
    def members_path(self) -> Path:
        """Where the byte offsets of this shard's samples are kept."""
        return members_path(self.path)

    @property
    def members_name(self) -> str:
        """How errors call that file."""
        return f"{self.folder_url}/{self.members_path.name}" if self.cache else str(self.members_path)

    @property
    def tar_file(self) -> RemoteFile:
        """What the cache fetches, if the set is remote."""
        return RemoteFile(self.name, self.size, self.sha256)

    @property
    def members_file(self) -> RemoteFile:
        """Likewise, of the member records."""
        return RemoteFile(self.members_name, self.members_size, self.members_sha256)

    def open(self) -> BinaryIO:
        """The tar file, fetched first if it must be. OSError or UserError if it cannot be had."""
        return self.cache.open(self.tar_file) if self.cache else self.path.open("rb", buffering=0)

    def open_members(self) -> BinaryIO:
        """The member records, likewise."""
        return self.cache.open(self.members_file) if self.cache else self.members_path.open("rb", buffering=0)

    def read(self, record: "np.void") -> Sample:
        """The encoded pair of one member record, its checksums compared.

        Raises DamagedSample if the bytes are not those that were packed, UserError if the shard is missing.
        """
        try:
            return self._read(record)
        except DamagedSample:
            # A copy was whole when it was fetched; the node's disk may have damaged it since.
            if not self._forget_damaged_copy(self.tar_file):
                raise
        return self._read(record)

    def _read(self, record: "np.void") -> Sample:
        key = member_key(record)
        payloads = []
        try:
            with self.open() as file:
                for part in ("image", "mask"):
                    offset, size = int(record[f"{part}_offset"]), int(record[f"{part}_size"])
                    # Records of damaged sets can claim gigabytes: never ask for more than the shard holds.
                    payload = os.pread(file.fileno(), size, offset) if offset + size <= self.size else b""
                    if zlib.crc32(payload) != record[f"{part}_crc32"]:
                        raise DamagedSample(key, f"its {part} does not have the checksum it was packed with", self.name)
                    payloads.append(payload)
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be read ({error.strerror}); {INDEX_NAME} lists it; restore it from a copy, or "
                "pack the scenes again"
            ) from error
        return Sample(key, *payloads)

    def read_members(self) -> bytes:
        """The file of member records, its SHA-256 compared; UserError if it is not what was packed."""
        data = members_data(self)
        if not self._is_members(data) and self._forget_damaged_copy(self.members_file):
            data = members_data(self)
        if not self._is_members(data):
            raise UserError(
                f"{self.members_name} differs from its SHA-256 in {INDEX_NAME}; restore it, or pack the scenes again"
            )
        return data

    def _is_members(self, data: bytes) -> bool:
        return hashlib.sha256(data).hexdigest() == self.members_sha256

    def _forget_damaged_copy(self, file: RemoteFile) -> bool:
        """Have the cache fetch `file` anew if its copy is not what was fetched; whether it will."""
        if not self.cache:
            return False
        whole = sha256(self.cache.fetch(file)) == file.sha256
        if not whole:
            self.cache.discard(file)
        return not whole


@lru_cache(maxsize=1024)
def read_members(shard: Shard) -> "NDArray[np.void]":
    """The records of a shard's samples (see `member_dtype`); UserError unless they are those that were packed."""
    return parse_members(shard.read_members(), shard.members_name, shard.num_samples)


def load_members(shard: Shard) -> "NDArray[np.void]":
    """The records as they are, changed or not; UserError if they have not the form of records."""
    return parse_members(members_data(shard), shard.members_name, shard.num_samples)


def members_data(shard: Shard) -> bytes:
    """The file of member records as it is; UserError if it is not there, or of another size."""
    try:
        with shard.open_members() as file:
            data = os.pread(file.fileno(), shard.members_size + 1, 0)
    except OSError as error:
        raise UserError(
            f"{shard.members_name} cannot be read ({error.strerror}); restore it, or pack the scenes again"
        ) from error
    if len(data) != shard.members_size:
        raise UserError(
            f"{shard.members_name} has not the {shard.members_size} bytes that {INDEX_NAME} says; restore it, or pack "
            "the scenes again"
        )
    return data
