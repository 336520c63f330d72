"""The sample stream: which sample is trained at which position. A pure function; nothing is stored or shuffled.

Position p is sample order(seed, epoch)[p mod N] with epoch = p // N. The order is computed, not listed, so a position
costs the same in a set of 30 samples and of a billion. It is made in two steps, each a keyed permutation:

    blocks     samples that lie together (a shard) are moved as one, to slots 0..N-1 of the epoch
    windows    within a window of slots, single samples are moved

A window as long as the epoch is a plain shuffle. A shorter one keeps what is read at a time to its own shards. Lanes
cut the slots into equal runs that are read side by side: position p is in lane p mod L, so that a reader of some
lanes meets their shards alone (see `ranks.BatchPlan`). Neither knows how many ranks or nodes there are.
"""

from collections.abc import Sequence, Sized
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError
from fcn_dist.keys import Purpose, key64

# Four rounds suffice for a pseudo-random permutation (Luby & Rackoff 1988); small domains want a few more.
FEISTEL_ROUNDS = 8


class SampleStream:
    """The endless order in which samples are trained."""

    def __init__(
        self,
        samples: ShardSet | Sized,
        seed: int,
        *,
        window: int | None = None,
        lanes: int = 1,
        block: int | None = None,
    ) -> None:
        """The stream over a shard set, or over anything else with a length.

        `window` is the number of blocks that are read at a time over all `lanes`, None for all of them. `block` is
        the number of samples that lie together; by default those of a shard.

        Raises ValueError if there are no samples, UserError if window or lanes do not fit them.
        """
        self.num_samples = len(samples)
        self.seed = seed
        if not self.num_samples:
            raise ValueError("a stream needs at least one sample")
        _check_locality(self.num_samples, window, lanes)
        self.lanes = lanes
        if block is None:
            block = samples.samples_per_shard if isinstance(samples, ShardSet) else self.num_samples
        # A shuffle of the whole epoch needs no blocks: moving all samples as one leaves them where they are.
        self._block = self.num_samples if window is None and lanes == 1 else min(block, self.num_samples)
        self._blocks = -(-self.num_samples // self._block)
        longest = -(-self.num_samples // lanes)
        self._window = longest if window is None else min(longest, -(-window * self._block // lanes))
        self._windows = -(-longest // self._window)  # of the longest lane

    def epoch(self, position: int) -> int:
        """The epoch that `position` lies in."""
        return position // self.num_samples

    def samples(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """Sample indices at `positions`, which may cross epochs, shape (len(positions),)."""
        epochs, offsets = np.divmod(np.array(positions, np.int64), self.num_samples)
        inner, lanes = np.divmod(offsets, self.lanes)
        # Windows are numbered on through lanes and epochs; each has a permutation of its own.
        numbers = (epochs * self.lanes + lanes) * self._windows + inner // self._window
        samples = np.empty_like(offsets)
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            samples[inside] = self._of_window(inner[inside] % self._window, number)
        return samples

    def sample(self, position: int) -> int:
        """The sample index at one position."""
        return int(self.samples((position,))[0])

    def replacement(self, position: int, attempt: int) -> int:
        """The sample that stands in at `position` where the one of the order, and `attempt` others, are damaged."""
        return key64(Purpose.REPLACEMENT, self.seed, position, attempt) % self.num_samples

    def _of_window(self, offsets: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Samples at `offsets` within window `number`."""
        rest, window = divmod(number, self._windows)
        epoch, lane = divmod(rest, self.lanes)
        # The first lanes are longer by one where the lanes do not divide the epoch.
        short, longer = divmod(self.num_samples, self.lanes)
        lane_size, lane_start = short + (lane < longer), lane * short + min(lane, longer)
        start = window * self._window
        size = min(self._window, lane_size - start)
        slots = lane_start + start + permute(offsets, size, Purpose.ORDER, self.seed, number)
        return self._at_slots(slots, epoch)

    def _at_slots(self, slots: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Samples at `slots` of an epoch whose blocks are permuted."""
        last = self._blocks - 1
        missing = self._blocks * self._block - self.num_samples  # samples by which the last block is short
        # The last block takes a place drawn at random; the others, all of one size, are permuted around it.
        its_place = key64(Purpose.BLOCKS, self.seed, epoch) % self._blocks
        slots = np.where(slots < (its_place + 1) * self._block - missing, slots, slots + missing)
        places, within = np.divmod(slots, self._block)
        blocks = np.full_like(places, last)
        others = places != its_place
        moved = places[others] - (places[others] > its_place)
        blocks[others] = permute(moved, last, Purpose.BLOCKS, self.seed, epoch)
        return blocks * self._block + within


def _check_locality(num_samples: int, window: int | None, lanes: int) -> None:
    if not 1 <= lanes <= num_samples:
        raise UserError(
            f"data.lanes is {lanes}; between 1 and the {num_samples} samples of the set are needed; the number of "
            "nodes, or a multiple of it, is usual"
        )
    if window is not None and window < lanes:
        raise UserError(
            f"data.window is {window} shards for {lanes} lanes; each lane needs one at least; raise data.window, or "
            "lower data.lanes"
        )


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


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(key64(*key, number) for number in range(FEISTEL_ROUNDS))
