"""Stream positions in, crops out: read, check, decode, cut; or replace what is damaged, within a budget."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fcn_dist.config import DataConfig
from fcn_dist.data.decoders import decode_mask
from fcn_dist.data.shard import DamagedSample, Sample, Shard
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.transforms import Pixels, check_size, crop_into, decode, draw_mixed_window, draw_window, generator
from fcn_dist.errors import UserError
from fcn_dist.keys import Purpose
from fcn_dist.labels import IGNORE_LABEL

MAX_REPLACEMENTS = 100  # at one position: if as many drawn samples are damaged, most of the set is


class BadSample(NamedTuple):
    """A damaged sample that another one has replaced."""

    shard: str
    key: str
    reason: str
    position: int  # of the stream, where it was met


@dataclass(frozen=True)
class CropReader:
    """Fills micro-batches of one stream over one shard set."""

    shard_set: ShardSet
    stream: SampleStream
    config: DataConfig

    def fill(self, positions: Sequence[int], images: Pixels, targets: Pixels) -> tuple[BadSample, ...]:
        """Write the crops of `positions` into images (B, H, W, 3) and targets (B, H, W).

        Returns the samples that had to be replaced. Raises DamagedSample for the first if the budget is 0.
        """
        bad: list[BadSample] = []
        for row, (position, index) in enumerate(zip(positions, self.stream.samples(positions).tolist(), strict=True)):
            bad += self._fill_one(position, index, images[row], targets[row])
        return tuple(bad)

    def _fill_one(self, position: int, index: int, image_out: Pixels, target_out: Pixels) -> list[BadSample]:
        bad: list[BadSample] = []
        for attempt in range(MAX_REPLACEMENTS):
            try:
                self._read(position, index, image_out, target_out)
            except DamagedSample as error:
                if not self.config.max_bad_samples:
                    raise
                bad.append(BadSample(error.shard, error.key, error.reason, position))
                index = self.stream.replacement(position, attempt)
            else:
                return bad
        raise UserError(
            f"{len(bad)} samples in a row that were to stand at position {position} are damaged, the last of them "
            f"{bad[-1].key!r} in {bad[-1].shard}; check the shards with shards/verify.py, and restore or repack them"
        )

    def _read(self, position: int, index: int, image_out: Pixels, target_out: Pixels) -> None:
        shard, record = self.shard_set.locate(index)
        rng = generator(self.stream.seed, position, Purpose.CROP)
        if self.config.class_limit < 1:
            sample, mask = read_mask(self.shard_set, shard, record)
            window = draw_mixed_window(rng, self._to_targets(mask), self.config)
            image, mask = decode_sample(sample, shard, window.reduction, mask)
        else:
            window = draw_window(rng, int(record["height"]), int(record["width"]), self.config)
            image, mask = read_arrays(self.shard_set, shard, record, window.reduction)
        if window.size != self.config.crop:
            np.copyto(image_out, self._padding)
            target_out[:] = IGNORE_LABEL
        # Labels become targets before they are placed, so padding is ignored whatever the rule.
        crop_into(window, image, self._to_targets(mask), image_out, target_out, self.config.interpolation)

    def _to_targets(self, mask: Pixels) -> Pixels:
        return np.asarray(cv2.LUT(mask, self._targets), np.uint8)

    @cached_property
    def _targets(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.shard_set.label_rule(self.config.score_other).target_table, np.uint8)

    @cached_property
    def _padding(self) -> Pixels:
        """A crop of the set's mean colour: copied, it costs a twentieth of broadcasting three bytes."""
        padding = np.empty((*self.config.crop, 3), np.uint8)
        padding[:] = np.rint(self.shard_set.channel_mean).astype(np.uint8)
        return padding


def trained_samples(stream: SampleStream, positions: Sequence[int], replaced: Iterable[BadSample]) -> list[int]:
    """The samples that a micro-batch holds, given those that were replaced in it."""
    attempts = Counter(bad.position for bad in replaced)
    return [
        stream.replacement(position, attempts[position] - 1) if attempts[position] else index
        for position, index in zip(positions, stream.samples(positions).tolist(), strict=True)
    ]


def read_arrays(shard_set: ShardSet, shard: Shard, record: "np.void", reduction: int = 1) -> tuple[Pixels, Pixels]:
    """Image, at 1/`reduction` of its size, and mask of one member record; DamagedSample names shard and key."""
    return decode_sample(_read(shard_set, shard, record), shard, reduction)


def read_mask(shard_set: ShardSet, shard: Shard, record: "np.void") -> tuple[Sample, Pixels]:
    """A member record's sample with its image as it is stored, and its mask; DamagedSample names shard and key."""
    sample = _read(shard_set, shard, record)
    mask = decode_mask(sample.mask)
    if mask is None:
        decode_sample(sample, shard)  # says what is wrong
        raise AssertionError(f"{sample.key} in {shard.name} decodes at one time and not at another")
    return sample, mask


def decode_sample(
    sample: Sample, shard: Shard, reduction: int = 1, mask: Pixels | None = None
) -> tuple[Pixels, Pixels]:
    """As `decode`; DamagedSample names shard and key."""
    with _naming(shard):
        return decode(sample, reduction, mask)


def _read(shard_set: ShardSet, shard: Shard, record: "np.void") -> Sample:
    with _naming(shard):
        sample = shard.read(record)
        check_size(sample, (int(record["height"]), int(record["width"])), shard_set.max_pixels)
        return sample


@contextmanager
def _naming(shard: Shard) -> Iterator[None]:
    try:
        yield
    except DamagedSample as error:
        error.shard = shard.name
        raise
