"""The shards of a set as an array of records, made from the index or mapped from a file beside it.

The index of a million shards is a third of a gigabyte of JSON, and takes ten seconds and as much memory to parse. So
beside an index of more than HEAD_SIZE bytes lies the same list as an array that is mapped, not read; the head of the
index holds its SHA-256.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.remote.cache import NodeCache
from fcn_dist.data.shard import Shard
from fcn_dist.errors import UserError
from fcn_dist.files import sha256

TABLE_NAME = "shards.npy"
HEAD_SIZE = 4 * 2**20  # bytes of an index within which all but a long list of shards must stand
REMEMBERED = 1024  # shards made from their records


class Totals(NamedTuple):
    """What would take a walk through the whole table."""

    samples: int
    size: int  # bytes of all files
    most_samples: int  # of one shard


class ShardTable(Sequence[Shard]):
    """The shards of one set; single ones are made when they are asked for."""

    def __init__(self, records: "NDArray[np.void]", totals: Totals, location: str, cache: NodeCache | None) -> None:
        self.totals = totals
        self._records = records
        self._location = location
        self._cache = cache
        self._made: dict[int, Shard] = {}

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> "ShardTable": ...
    def __getitem__(self, number: int | slice) -> "Shard | ShardTable":
        if isinstance(number, slice):
            part = self._records[number]
            return ShardTable(part, totals_of(part), self._location, self._cache)
        shard = self._made.get(number)
        if shard is None:
            if len(self._made) >= REMEMBERED:
                self._made.clear()
            shard = self._made[number] = self._make(self._records[number])
        return shard

    def _make(self, record: "np.void") -> Shard:
        try:
            # Of a mapped table no name has been looked at yet.
            name = check_plain_name(record["url"].decode(errors="replace"))
        except ValueError as error:
            raise UserError(f"{self._location}: {error}; restore the set, or pack the scenes again") from error
        return Shard(
            Path(self._location) / name,
            int(record["nsamples"]),
            int(record["filesize"]),
            record["sha256"].tobytes().hex(),
            int(record["members_filesize"]),
            record["members_sha256"].tobytes().hex(),
            self._location if self._cache else "",
            self._cache,
        )

    def equal(self, records: "NDArray[np.void]") -> bool:
        """Whether these are the same shards."""
        return bool(self._records.dtype == records.dtype and np.array_equal(self._records, records))

    def first_sample(self, number: int) -> int:
        """The index of the first sample of a shard."""
        return int(self._records[number]["first"])

    def holding(self, samples: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """The number of the shard that holds each sample, 0 <= sample < totals.samples."""
        # Shards are of one size, but for the last, unless they were cut by bytes.
        numbers = np.minimum(samples // self.totals.most_samples, len(self) - 1)
        found = self._records[numbers]
        first = found["first"].astype(np.int64)
        for row in np.flatnonzero((samples < first) | (samples >= first + found["nsamples"])):
            numbers[row] = bisect.bisect_right(self._records, int(samples[row]), key=_first) - 1
        return numbers


def _first(record: "np.void") -> int:
    return int(record["first"])


def record_dtype(url_bytes: int) -> np.dtype[np.void]:
    """The record of one shard; `url_bytes` is the length of the longest name in UTF-8."""
    return np.dtype(
        [
            ("first", "<u8"),  # index of its first sample
            ("nsamples", "<u8"),
            ("filesize", "<u8"),
            ("members_filesize", "<u8"),
            ("sha256", "u1", 32),
            ("members_sha256", "u1", 32),
            ("url", f"S{url_bytes}"),
        ]
    )


def records_of(entries: Sequence[dict[str, Any]]) -> "NDArray[np.void]":
    """The records of an index's shardlist; KeyError, TypeError or ValueError if an entry has not its form."""
    names = [check_plain_name(entry["url"]).encode() for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError("the same shard is listed twice")
    records = np.zeros(len(entries), record_dtype(max(map(len, names), default=1)))
    records["url"] = names
    for field in ("nsamples", "filesize", "members_filesize"):
        records[field] = [_count(entry[field], field) for entry in entries]
    for field in ("sha256", "members_sha256"):
        digests = b"".join(_digest(entry[field], field) for entry in entries)
        records[field] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    records["first"] = np.cumsum(records["nsamples"]) - records["nsamples"]
    return records


def totals_of(records: "NDArray[np.void]") -> Totals:
    """Added up."""
    sizes = int(records["filesize"].sum()) + int(records["members_filesize"].sum())
    return Totals(int(records["nsamples"].sum()), sizes, int(records["nsamples"].max(initial=0)))


def write_table(path: Path, records: "NDArray[np.void]") -> str:
    """Write the table and return its SHA-256."""
    with path.open("wb") as file:
        np.save(file, records, allow_pickle=False)
    return sha256(path)


def map_table(path: Path, digest: str, totals: Totals) -> "NDArray[np.void]":
    """The table at `path`, mapped; UserError if it is not the one of which the index states digest and totals."""
    try:
        found = sha256(path)  # read in blocks: mapped pages would count as this process's memory
        if found != digest:
            raise ValueError(f"its SHA-256 is {found}, the index states {digest}")
        records: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        names = records.dtype["url"].itemsize if "url" in (records.dtype.names or ()) else 1
        if records.dtype != record_dtype(names) or records.ndim != 1 or not len(records):
            raise ValueError(f"it holds {records.dtype} of shape {records.shape}")
        last = records[-1]
        if int(last["first"]) + int(last["nsamples"]) != totals.samples or totals.most_samples < 1:
            raise ValueError(f"its last shard does not end at the {totals.samples} samples that the index states")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be used ({error}); restore it, or pack the scenes again") from error
    return records


def check_plain_name(url: str) -> str:
    """`url` if it is the name of a tar file beside the index; else ValueError.

    An index is data from elsewhere: it must not lead out of its own folder, nor mean something else in a URL.
    """
    if Path(url).name != url or not url.endswith(".tar") or set(url) & set("?#%\\:"):
        raise ValueError(f"shard url {url!r} is not the name of a tar file beside the index")
    return url


def _count(value: Any, field: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{field} {value!r} is no count")
    return value


def _digest(value: str, field: str) -> bytes:
    digest = bytes.fromhex(value)
    if len(digest) != 32:
        raise ValueError(f"{field} {value!r} is no SHA-256")
    return digest
