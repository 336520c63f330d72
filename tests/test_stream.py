"""The stream: a permutation an epoch, the same global batches on any ranks, at a cost that does not grow."""

import tracemalloc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_dist.data.stream import SampleStream
from fcn_dist.keys import key64, mix64
from fcn_dist.ranks import BatchPlan

sizes = st.integers(1, 2000)
seeds = st.integers(-(2**40), 2**70)
epochs = st.integers(0, 10**9)


def stream_of(size: int, seed: int) -> SampleStream:
    return SampleStream(range(size), seed)


def epoch_of(stream: SampleStream, epoch: int) -> list[int]:
    start = epoch * stream.num_samples
    order: list[int] = stream.samples(range(start, start + stream.num_samples)).tolist()
    return order


@given(sizes, seeds, epochs)
@settings(max_examples=100)
def test_every_epoch_holds_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_of(stream_of(size, seed), epoch)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025])
def test_sizes_around_powers_of_two_are_permuted_too(size: int) -> None:
    for epoch in range(20):
        assert sorted(epoch_of(stream_of(size, 3), epoch)) == list(range(size))


@given(st.integers(20, 2000), seeds, epochs)
@settings(max_examples=60)
def test_no_two_epochs_and_no_two_seeds_share_an_order(size: int, seed: int, epoch: int) -> None:
    one = epoch_of(stream_of(size, seed), epoch)
    assert one != epoch_of(stream_of(size, seed), epoch + 1)
    assert one != epoch_of(stream_of(size, seed + 1), epoch)
    assert one == epoch_of(stream_of(size, seed), epoch)


@given(sizes, seeds, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 500))
@settings(max_examples=50)
def test_a_step_trains_the_same_samples_on_any_ranks(
    size: int, seed: int, ranks: int, accumulation: int, micro_batch: int, step: int
) -> None:
    stream = stream_of(size, seed)
    total = ranks * accumulation * micro_batch
    plan = BatchPlan(total, micro_batch, accumulation, ranks)
    trained: list[int] = []
    for rank in range(ranks):
        for part in range(accumulation):
            trained += stream.samples(plan.positions(rank, step * accumulation + part)).tolist()
    # The oracle: single positions, one after another.
    assert trained == [stream.sample(position) for position in range(step * total, (step + 1) * total)]


@given(st.integers(1, 60), seeds, st.integers(1, 25))
@settings(max_examples=50)
def test_global_batches_that_cross_epochs_still_train_each_sample_once_an_epoch(
    size: int, seed: int, total: int
) -> None:
    stream, plan = stream_of(size, seed), BatchPlan(total, total, 1, 1)
    steps = -(-3 * size // total)
    trained = np.concatenate([stream.samples(plan.positions(0, step)) for step in range(steps)])[: 3 * size]
    assert Counter(trained.tolist()) == dict.fromkeys(range(size), 3)


@given(st.integers(50, 2000), seeds, st.integers(0, 5000), st.integers(0, 300))
@settings(max_examples=40)
def test_a_stream_read_from_any_position_goes_on_as_if_read_from_the_start(
    size: int, seed: int, start: int, length: int
) -> None:
    whole = stream_of(size, seed).samples(range(start + length))
    assert stream_of(size, seed).samples(range(start, start + length)).tolist() == whole[start:].tolist()


def test_a_position_in_a_billion_samples_costs_no_memory() -> None:
    size = 10**9
    stream_of(size, 0).sample(0)  # imports and caches, once
    tracemalloc.start()
    try:
        stream = stream_of(size, 1)
        positions = range(7 * size + 123_456_789, 7 * size + 123_456_789 + 64)
        samples = stream.samples(positions)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(samples.tolist())) == 64
    assert samples.min() >= 0 and samples.max() < size
    assert stream.epoch(positions[0]) == 7
    assert peak < 100_000


def chi_square(found: Counter[Any], cells: int) -> float:
    expected = found.total() / cells
    seen = sum((count - expected) ** 2 / expected for count in found.values())
    return seen + (cells - len(found)) * expected


@pytest.mark.parametrize("size", [5, 16, 17])
def test_every_sample_is_equally_often_at_every_place_of_an_epoch(size: int) -> None:
    orders = stream_of(size, 11).samples(range(500 * size)).reshape(500, size)
    for place in range(size):
        found = Counter(orders[:, place].tolist())
        # Chi-square with size - 1 degrees of freedom: mean plus five standard deviations.
        assert chi_square(found, size) < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_every_order_of_three_samples_comes_up_equally_often_over_seeds() -> None:
    found = Counter(tuple(epoch_of(stream_of(3, seed), 0)) for seed in range(600))
    assert len(found) == 6
    assert chi_square(found, 6) < 5 + 5 * 10**0.5


def test_neighbours_in_the_set_are_not_neighbours_in_the_stream() -> None:
    order = np.array(epoch_of(stream_of(100_000, 0), 0))
    together = np.count_nonzero(np.abs(np.diff(order)) == 1)
    assert together < 20  # 2 are expected of a random permutation
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.02


def test_an_empty_set_has_no_stream() -> None:
    empty: Sequence[object] = []
    with pytest.raises(ValueError, match="at least one sample"):
        SampleStream(empty, 0)


def test_mix64_is_splitmix64_s_published_finaliser() -> None:
    # The first outputs of splitmix64 from state 0, as listed with xoshiro's reference code.
    golden = 0x9E3779B97F4A7C15
    outputs = [mix64(number * golden) for number in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keys_depend_on_every_part_and_on_their_order() -> None:
    keys = {key64(*parts) for parts in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (-1,), (2**63,))}
    assert len(keys) == 10
    assert all(0 <= key < 2**64 for key in keys)
