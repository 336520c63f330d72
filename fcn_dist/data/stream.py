"""The sample stream: which sample is trained at which position. A pure function; nothing is stored or shuffled.

Position p is sample order(seed, epoch)[p mod N] with epoch = p // N. The order is a keyed permutation that is
computed, not listed, so a position costs the same in a set of 30 samples and of a billion.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.shardset import ShardSet
from fcn_dist.keys import Purpose, key64

# Four rounds suffice for a pseudo-random permutation (Luby & Rackoff 1988); small domains want a few more.
FEISTEL_ROUNDS = 8


class SampleStream:
    """The endless order in which samples are trained.

    Takes a shard set, or anything else with a length. Raises ValueError if it is empty.
    """

    def __init__(self, shard_set: ShardSet | Sequence[object], seed: int) -> None:
        self.num_samples = len(shard_set)
        self.seed = seed
        if not self.num_samples:
            raise ValueError("a stream needs at least one sample")

    def epoch(self, position: int) -> int:
        """The epoch that `position` lies in."""
        return position // self.num_samples

    def samples(self, positions: range) -> NDArray[np.int64]:
        """Sample indices at `positions`, which may cross epochs, shape (len(positions),)."""
        at = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        epochs, offsets = np.divmod(at, self.num_samples)
        samples = np.empty_like(at)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            samples[inside] = permute(offsets[inside], self.num_samples, self.seed, int(epoch))
        return samples

    def sample(self, position: int) -> int:
        """The sample index at one position."""
        return int(self.samples(range(position, position + 1))[0])


def permute(offsets: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Images of `offsets` under a permutation of range(size) chosen by `key`.

    A Feistel network permutes the next power of four; values outside the range are sent through again until they
    land inside (cycle walking; Black & Rogaway 2002), fewer than four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    values = offsets.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix64(right + np.uint64(key)) & mask)
    return (left << shift) | right


def _mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`keys.mix64` on arrays; unsigned arithmetic wraps as intended."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=8)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(key64(Purpose.ORDER, *key, number) for number in range(FEISTEL_ROUNDS))
