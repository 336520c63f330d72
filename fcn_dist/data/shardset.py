"""A shard set: a folder of tar shards with its index.json in, single samples out.

Beside each `NAME.tar` lies `NAME.members.npy`, one record a sample (see `member_dtype`), so that any sample is
read directly and the index does not grow with the data set.
"""

import json
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fcn_dist.errors import UserError
from fcn_dist.files import sha256
from fcn_dist.labels import LabelRule

INDEX_NAME = "index.json"
INDEX_KIND = "wids-shard-index-v1"
FORMAT_VERSION = 2


class DamagedSample(UserError):
    """A sample's bytes are not those that were packed; the message names shard, key and reason."""


class Sample(NamedTuple):
    """One packed pair, still encoded."""

    key: str
    image: bytes  # JPEG, RGB
    mask: bytes  # PNG, mode L, raw labels


@dataclass(frozen=True)
class Shard:
    """One tar file as the index lists it."""

    path: Path
    num_samples: int
    size: int
    sha256: str
    members_size: int  # bytes of the file beside it with one record a sample
    members_sha256: str

    @property
    def members_path(self) -> Path:
        """Where the byte offsets of this shard's samples are kept."""
        return members_path(self.path)


@dataclass(frozen=True)
class ShardSet:
    """One split of a packed data set."""

    dir: Path
    split: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]  # names of labels 1..N
    colours: tuple[tuple[int, int, int], ...]  # RGB of labels 1..N
    class_pixels: tuple[int, ...]  # pixels of labels 0..N
    class_images: tuple[int, ...]  # images in which labels 0..N occur
    channel_mean: tuple[float, float, float]  # RGB, 0-255, over all pixels of the set
    channel_std: tuple[float, float, float]
    max_pixels: int  # no image has more
    created_by: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str, split: str | None = None) -> "ShardSet":
        """Read `folder/index.json`, or `folder/split/index.json` if a split is named.

        Raises UserError if there is no index, or one that this version cannot read.
        """
        folder = Path(folder) / split if split else Path(folder)
        index = _read_index(folder)
        try:
            return cls._from_index(folder, index)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / INDEX_NAME} lacks or misstates a field ({error!r}); an index written by "
                "shards/create.py is needed; pack the scenes again"
            ) from error

    @classmethod
    def _from_index(cls, folder: Path, index: dict[str, Any]) -> "ShardSet":
        shards = tuple(
            Shard(
                _inside(folder, entry["url"]),
                int(entry["nsamples"]),
                int(entry["filesize"]),
                entry["sha256"],
                int(entry["members_filesize"]),
                entry["members_sha256"],
            )
            for entry in index["shardlist"]
        )
        shard_set = cls(
            folder,
            index["name"],
            shards,
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
        if len({shard.path for shard in self.shards}) != len(self.shards):
            raise ValueError("the same shard is listed twice")
        for field, expected in (("colours", labels - 1), ("class_pixels", labels), ("class_images", labels)):
            if len(getattr(self, field)) != expected:
                raise ValueError(f"{len(getattr(self, field))} {field} for {labels - 1} classes")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0] + [shard.num_samples for shard in self.shards], dtype=np.int64)

    @property
    def samples_per_shard(self) -> int:
        """Samples of the largest shard; most have as many."""
        return max(shard.num_samples for shard in self.shards)

    def label_rule(self, score_other: bool = False) -> LabelRule:
        """How this set's labels become network outputs."""
        return LabelRule(len(self.classes), score_other)

    def locate(self, index: int) -> tuple[Shard, "np.void"]:
        """The shard that holds sample `index` (0 <= index < len) and its member record."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self.shards[number]
        return shard, read_members(shard)[index - int(self._starts[number])]

    def key(self, index: int) -> str:
        """The name of sample `index`."""
        return str(self.locate(index)[1]["key"].decode())

    def read(self, index: int) -> Sample:
        """The encoded pair of sample `index`, its checksums compared.

        Raises DamagedSample if the bytes are not those that were packed, UserError if the shard is missing.
        """
        shard, member = self.locate(index)
        key = member["key"].decode()
        parts = []
        try:
            with shard.path.open("rb", buffering=0) as file:
                for part in ("image", "mask"):
                    file.seek(int(member[f"{part}_offset"]))
                    payload = file.read(int(member[f"{part}_size"]))
                    if zlib.crc32(payload) != member[f"{part}_crc32"]:
                        raise DamagedSample(
                            f"{shard.path}: the {part} of sample {key!r} does not have the checksum it was packed "
                            "with; restore the shard from a copy, or pack the scenes again"
                        )
                    parts.append(payload)
        except OSError as error:
            raise UserError(
                f"{shard.path} cannot be read ({error.strerror}); {INDEX_NAME} lists it; restore it from a copy, "
                "or pack the scenes again"
            ) from error
        return Sample(key, parts[0], parts[1])


def member_dtype(key_bytes: int) -> np.dtype[np.void]:
    """The record of one sample: key, byte ranges of both payloads in the tar with their CRC-32, and size.

    `key_bytes` is the length of the longest key of the shard in UTF-8.
    """
    return np.dtype(
        [
            ("key", f"S{key_bytes}"),
            ("image_offset", "<u8"),
            ("image_size", "<u4"),
            ("image_crc32", "<u4"),
            ("mask_offset", "<u8"),
            ("mask_size", "<u4"),
            ("mask_crc32", "<u4"),
            ("height", "<u4"),
            ("width", "<u4"),
        ]
    )


def members_path(shard_path: Path) -> Path:
    """`x/training-000000.tar` -> `x/training-000000.members.npy`."""
    return shard_path.with_suffix(".members.npy")


@lru_cache(maxsize=1024)
def read_members(shard: Shard) -> "NDArray[np.void]":
    """The records of a shard's samples (see `member_dtype`); UserError unless they are those that were packed."""
    members = load_members(shard)
    if sha256(shard.members_path) != shard.members_sha256:
        raise UserError(
            f"{shard.members_path} differs from its SHA-256 in {INDEX_NAME}; restore it, or pack the scenes again"
        )
    return members


def load_members(shard: Shard) -> "NDArray[np.void]":
    """The records as they are, changed or not; UserError if they have not the form of records."""
    path = shard.members_path
    try:
        members: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or pack the scenes again") from error
    key_bytes = members.dtype["key"].itemsize if "key" in (members.dtype.names or ()) else 1
    if members.dtype != member_dtype(key_bytes) or members.shape != (shard.num_samples,):
        raise UserError(
            f"{path} has records of shape {members.shape} and fields {members.dtype.names}; "
            f"{shard.num_samples} records of {member_dtype(1).names} are needed; restore it, or pack the scenes "
            "again"
        )
    return members


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        splits = sorted(p.parent.name for p in folder.glob(f"*/{INDEX_NAME}")) if folder.is_dir() else []
        hint = f"it has the splits {', '.join(splits)}" if splits else "make one with shards/create.py"
        raise UserError(
            f"{folder} is no shard set: {path} cannot be read ({error.strerror}); a folder with an index is "
            f"needed; {hint}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or pack the scenes again") from error
    kind, version = (index.get(k) if isinstance(index, dict) else None for k in ("__kind__", "format_version"))
    if kind != INDEX_KIND or version != FORMAT_VERSION:
        raise UserError(
            f"{path} has __kind__ {kind!r} and format_version {version!r}; {INDEX_KIND!r} and {FORMAT_VERSION} "
            "are needed; pack the scenes with shards/create.py"
        )
    return dict(index)


def _inside(folder: Path, url: str) -> Path:
    # An index is data from elsewhere: it must not lead out of its own folder.
    if Path(url).name != url or not url.endswith(".tar"):
        raise ValueError(f"shard url {url!r} is not the name of a tar file beside the index")
    return folder / url


def _triple(values: list[float]) -> tuple[float, float, float]:
    r, g, b = (float(v) for v in values)
    return r, g, b
