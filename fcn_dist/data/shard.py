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

from fcn_dist.data.cache import NodeCache, RemoteFile
from fcn_dist.data.members import members_path, parse_members
from fcn_dist.errors import UserError

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
        key = record["key"].decode()
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


@lru_cache(maxsize=1024)
def read_members(shard: Shard) -> "NDArray[np.void]":
    """The records of a shard's samples (see `member_dtype`); UserError unless they are those that were packed."""
    data = _members_data(shard)
    members = parse_members(data, shard.members_name, shard.num_samples)
    if hashlib.sha256(data).hexdigest() != shard.members_sha256:
        raise UserError(
            f"{shard.members_name} differs from its SHA-256 in {INDEX_NAME}; restore it, or pack the scenes again"
        )
    return members


def load_members(shard: Shard) -> "NDArray[np.void]":
    """The records as they are, changed or not; UserError if they have not the form of records."""
    return parse_members(_members_data(shard), shard.members_name, shard.num_samples)


def _members_data(shard: Shard) -> bytes:
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
