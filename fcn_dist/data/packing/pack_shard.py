"""One planned shard in; the shard with its receipt out, or everything that is wrong with its pairs."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fcn_dist.data.packing.plan import ShardPlan
from fcn_dist.data.packing.receipts import RECORDED_KEYS, Conversion, Receipt, read_receipt, remove_shard
from fcn_dist.data.packing.tarshard import TarShard
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.scenes.listing import Problem
from fcn_dist.data.scenes.pairs import PackedPair, PairRules, pack_pair
from fcn_dist.data.workers import Advance
from fcn_dist.files import replacing, sync


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, or, if it shall not be, to check for problems alone."""

    folder: Path
    plan: ShardPlan
    rules: PairRules
    part: str  # as of the Receipt
    write: bool

    @property
    def path(self) -> Path:
        """Of the tar file."""
        return self.folder / self.plan.name


class ShardResult(NamedTuple):
    """What became of one shard."""

    receipt: Receipt | None  # None: it was not written
    kept: bool  # it was there already
    problems: list[Problem]


class _Unfit(Exception):
    """A pair of the shard has a problem."""


def pack_shard(job: ShardJob, advance: Advance) -> ShardResult:
    """Write one shard, its member records and its receipt, each whole or not there; or take it as it is.

    A shard with a problem is not written, but all of its pairs are checked.
    """
    receipt = finished(job)
    if receipt and (not job.write or receipt.is_true()):
        return ShardResult(receipt, True, [])
    problems: list[Problem] = []
    pairs = _sound_pairs(job, advance, problems)
    if not job.write:
        for _ in pairs:
            pass
        return ShardResult(None, False, problems)
    remove_shard(job.path)
    try:
        receipt = _write(job, pairs, advance, problems)
    except _Unfit:
        return ShardResult(None, False, problems)
    receipt.write()
    return ShardResult(receipt, False, [])


def finished(job: ShardJob) -> Receipt | None:
    """The receipt of a shard that was made from the same files in the same way."""
    receipt = read_receipt(job.path)
    return receipt if receipt and receipt.inputs == job.plan.inputs else None


def _write(
    job: ShardJob, pairs: Iterator[tuple[str, PackedPair]], advance: Advance, problems: list[Problem]
) -> Receipt:
    counts = PixelCounts.zero(job.rules.num_classes)
    converted: dict[str, list[str]] = defaultdict(list)
    with replacing(job.path) as partial:
        with partial.open("wb") as file, ThreadPoolExecutor(1) as flusher:
            tar = TarShard(file, flusher)
            for key, pair in pairs:
                tar.add(key, pair)
                counts.add_pair(pair.pixels, pair.labels)
                for kind in pair.conversions:
                    converted[kind].append(key)
            if problems:
                raise _Unfit
            shard = tar.finish(job.path)
        sync(partial)
        # Nothing may come to stand in the folder once the parent is dead: another run may be at work there.
        advance(0)
    conversions = {
        kind: Conversion(len(keys), tuple(sorted(keys)[:RECORDED_KEYS])) for kind, keys in sorted(converted.items())
    }
    return Receipt(shard, job.plan.content, job.plan.inputs, job.part, counts, conversions)


def _sound_pairs(job: ShardJob, advance: Advance, problems: list[Problem]) -> Iterator[tuple[str, PackedPair]]:
    """What is packed of each pair, up to the first that has a problem; the rest are checked alone."""
    for pair in job.plan.pairs:
        packed = pack_pair(pair, job.rules)
        if isinstance(packed, list):
            problems += packed
        elif not problems:
            yield pair.key, packed
        advance(1)
