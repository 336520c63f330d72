"""A shard set: a folder or URL of tar shards with its index.json in, single samples out."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcn_dist.addresses import is_url
from fcn_dist.data.members import member_key
from fcn_dist.data.remote.cache import NodeCache, RemoteFile, node_cache
from fcn_dist.data.remote.urls import read_start
from fcn_dist.data.shard import INDEX_NAME, Sample, Shard, read_members
from fcn_dist.data.shardtable import HEAD_SIZE, TABLE_NAME, ShardTable, Totals, map_table, records_of, totals_of
from fcn_dist.errors import UserError
from fcn_dist.labels import LabelRule

INDEX_KIND = "wids-shard-index-v1"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class ShardSet:
    """One split of a packed data set."""

    dir: Path  # of a local set
    location: str  # folder or URL, as errors name it
    index_sha256: str  # of its head, which is the whole index unless that is long; then the head has the list's digest
    cache: NodeCache | None  # of a remote set
    split: str
    shards: ShardTable
    classes: tuple[str, ...]  # names of labels 1..N
    colours: tuple[tuple[int, int, int], ...]  # RGB of labels 1..N
    class_pixels: tuple[int, ...]  # pixels of labels 0..N
    class_images: tuple[int, ...]  # images in which labels 0..N occur
    channel_mean: tuple[float, float, float]  # RGB, 0-255, over all pixels of the set
    channel_std: tuple[float, float, float]
    max_pixels: int  # no image has more
    created_by: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str, split: str | None = None, cache: NodeCache | None = None) -> "ShardSet":
        """Read `folder/index.json`, or `folder/split/index.json` if a split is named.

        `folder` may be a URL that fsspec reads; its shards are then kept in `cache`, by default the node's usual one.

        Raises UserError if there is no index, or one that this version cannot read.
        """
        location = "/".join([str(folder).rstrip("/"), *([split] if split else [])])
        cache = (cache or node_cache()) if is_url(location) else None
        head = _read_head(location, cache)
        index = _parse_head(head, f"{location}/{INDEX_NAME}")
        try:
            return cls._from_index(location, index, hashlib.sha256(head).hexdigest(), cache)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{location}/{INDEX_NAME} lacks or misstates a field ({error!r}); an index written by "
                "shards/create.py is needed; pack the scenes again"
            ) from error

    @classmethod
    def _from_index(cls, location: str, index: dict[str, Any], digest: str, cache: NodeCache | None) -> "ShardSet":
        shard_set = cls(
            Path(location),
            location,
            digest,
            cache,
            index["name"],
            _shard_table(location, index, cache),
            tuple(index["classes"]),
            tuple((int(r), int(g), int(b)) for r, g, b in index["colours"]),
            tuple(int(n) for n in index["class_pixels"]),
            tuple(int(n) for n in index["class_images"]),
            _triple(index["channel_mean"]),
            _triple(index["channel_std"]),
            int(index["max_pixels"]),
            dict(index["created_by"]),
        )
        shard_set._check(index["num_samples"])
        return shard_set

    def _check(self, num_samples: int) -> None:
        labels = len(self.classes) + 1
        if num_samples != len(self):
            raise ValueError(f"num_samples {num_samples}, but the shards hold {len(self)}")
        for field, expected in (("colours", labels - 1), ("class_pixels", labels), ("class_images", labels)):
            if len(getattr(self, field)) != expected:
                raise ValueError(f"{len(getattr(self, field))} {field} for {labels - 1} classes")

    def __len__(self) -> int:
        return self.shards.totals.samples

    @property
    def samples_per_shard(self) -> int:
        """Samples of the largest shard; most have as many."""
        return self.shards.totals.most_samples

    def label_rule(self, score_other: bool = False) -> LabelRule:
        """How this set's labels become network outputs."""
        return LabelRule(len(self.classes), score_other)

    def shard_numbers(self, indices: "NDArray[np.int64]") -> list[int]:
        """The shards that hold samples `indices`, each once, in the order of their first sample there."""
        return list(dict.fromkeys(self.shards.holding(indices).tolist()))

    def locate(self, index: int) -> tuple[Shard, "np.void"]:
        """The shard that holds sample `index` (0 <= index < len) and its member record."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(self.shards.holding(np.array([index]))[0])
        shard = self.shards[number]
        return shard, read_members(shard)[index - self.shards.first_sample(number)]

    def key(self, index: int) -> str:
        """The name of sample `index`."""
        return member_key(self.locate(index)[1])

    def read(self, index: int) -> Sample:
        """The encoded pair of sample `index`, its checksums compared.

        Raises DamagedSample if the bytes are not those that were packed, UserError if the shard is missing.
        """
        shard, record = self.locate(index)
        return shard.read(record)


def _read_head(location: str, cache: NodeCache | None) -> bytes:
    """The whole index, or as much of a long one as all but its shards take."""
    if cache:
        return read_start(f"{location}/{INDEX_NAME}", HEAD_SIZE)
    folder = Path(location)
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            return file.read(HEAD_SIZE)
    except OSError as error:
        splits = sorted(p.parent.name for p in folder.glob(f"*/{INDEX_NAME}")) if folder.is_dir() else []
        hint = f"it has the splits {', '.join(splits)}" if splits else "make one with shards/create.py"
        if (folder.parent / INDEX_NAME).is_file():
            hint = f"{folder.parent} is one split of a set; name the folder above, {folder.parent.parent}"
        raise UserError(
            f"{folder} is no shard set: {path} cannot be read ({error.strerror}); a folder with an index is "
            f"needed; {hint}"
        ) from error


def _parse_head(head: bytes, name: str) -> dict[str, Any]:
    """The index without its shards, if it is longer than its head."""
    if len(head) >= HEAD_SIZE:
        before, found, _ = head.partition(b',\n"shardlist": ')
        head = before + b"}" if found else head
    try:
        index = json.loads(head)
    except ValueError as error:
        raise UserError(f"{name} is not JSON ({error}); restore it, or pack the scenes again") from error
    kind, version = (index.get(k) if isinstance(index, dict) else None for k in ("__kind__", "format_version"))
    if kind != INDEX_KIND or version != FORMAT_VERSION:
        raise UserError(
            f"{name} has __kind__ {kind!r} and format_version {version!r}; {INDEX_KIND!r} and {FORMAT_VERSION} "
            "are needed; pack the scenes with shards/create.py"
        )
    return dict(index)


def _shard_table(location: str, index: dict[str, Any], cache: NodeCache | None) -> ShardTable:
    if "shardlist" in index:
        records = records_of(index["shardlist"])
        return ShardTable(records, totals_of(records), location, cache)
    stated = index["shard_table"]
    totals = Totals(*map(int, stated["totals"]))
    if cache:
        path = cache.fetch(RemoteFile(f"{location}/{TABLE_NAME}", stated["filesize"], stated["sha256"]))
    else:
        path = Path(location) / TABLE_NAME
    return ShardTable(map_table(path, stated["sha256"], totals), totals, location, cache)


def _triple(values: list[float]) -> tuple[float, float, float]:
    r, g, b = (float(v) for v in values)
    return r, g, b
