"""What is known of a finished shard before the set has an index: one small JSON file a shard, in SPLIT/.packing.

A receipt is written after its shard and lets a later run, or the merging of parts, take the shard for what it is.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcn_dist.data.members import members_path
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.shard import Shard
from fcn_dist.files import sha256, write_text

WORK_DIR = ".packing"
RECORDED_KEYS = 100  # of each kind of conversion; the index must not grow with the data set


class Conversion(NamedTuple):
    """How often one kind of conversion was made, and the first keys in their order."""

    times: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Receipt:
    """A finished shard, what it was made from, and what the index says of it."""

    shard: Shard
    content: str  # as of its ShardPlan
    inputs: str
    part: str  # of which it was packed, such as "1/2"; empty if the set was packed whole
    counts: PixelCounts
    conversions: dict[str, Conversion]

    def write(self) -> None:
        """Keep it beside the shard."""
        counts = {name: getattr(self.counts, name).tolist() for name in vars(self.counts)}
        facts = {
            "content": self.content,
            "inputs": self.inputs,
            "part": self.part,
            "shard": shard_entry(self.shard),
            "counts": counts,
            "conversions": self.conversions,
        }
        # One that a power failure spoils is no receipt, and the shard is packed again.
        write_text(receipt_path(self.shard.path), json.dumps(facts) + "\n", flush=False)

    def moved(self, folder: Path) -> "Receipt":
        """The same of a copy of the shard in another folder."""
        return replace(self, shard=replace(self.shard, path=folder / self.shard.path.name))

    def is_true(self) -> bool:
        """Whether the shard and its member records are there and have the bytes that the receipt states."""
        s = self.shard
        return has_bytes(s.path, s.size, s.sha256) and has_bytes(s.members_path, s.members_size, s.members_sha256)


def receipt_path(shard_path: Path) -> Path:
    """`x/training-000000.tar` -> `x/.packing/training-000000.json`."""
    return shard_path.parent / WORK_DIR / f"{shard_path.stem}.json"


def read_receipt(shard_path: Path) -> Receipt | None:
    """The receipt of a shard, or None if there is none, or none that can be read."""
    try:
        facts = json.loads(receipt_path(shard_path).read_text())
        counts = PixelCounts(**{name: np.array(values, np.int64) for name, values in facts["counts"].items()})
        conversions = {kind: Conversion(times, tuple(keys)) for kind, (times, keys) in facts["conversions"].items()}
        shard = _shard(shard_path, facts["shard"])
        return Receipt(shard, facts["content"], facts["inputs"], facts["part"], counts, conversions)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_shard(shard_path: Path) -> None:
    """Remove a shard with all that belongs to it; the receipt goes first."""
    for path in (receipt_path(shard_path), shard_path, members_path(shard_path)):
        path.unlink(missing_ok=True)


def has_bytes(path: Path, size: int, digest: str) -> bool:
    """Whether a file is there with this size and SHA-256."""
    try:
        return path.stat().st_size == size and sha256(path) == digest
    except OSError:
        return False


def shard_entry(shard: Shard) -> dict[str, Any]:
    """A shard as the index lists it."""
    return {
        "url": shard.path.name,
        "nsamples": shard.num_samples,
        "filesize": shard.size,
        "sha256": shard.sha256,
        "members_filesize": shard.members_size,
        "members_sha256": shard.members_sha256,
    }


def _shard(path: Path, entry: dict[str, Any]) -> Shard:
    if entry["url"] != path.name:
        raise ValueError(f"a receipt of {entry['url']}")
    sizes = (int(entry[name]) for name in ("nsamples", "filesize", "members_filesize"))
    num_samples, size, members_size = sizes
    return Shard(path, num_samples, size, str(entry["sha256"]), members_size, str(entry["members_sha256"]))
