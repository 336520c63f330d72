"""The stream: a permutation an epoch, the same global batches on any ranks, at a cost that does not grow."""

import tracemalloc
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_dist.data.stream import SampleStream
from fcn_dist.errors import UserError
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


# ---- windows and lanes


class Cut(NamedTuple):
    """A set, its blocks, and how they are read."""

    size: int
    block: int
    window: int | None
    lanes: int

    def stream(self, seed: int = 0) -> SampleStream:
        return SampleStream(range(self.size), seed, block=self.block, window=self.window, lanes=self.lanes)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    size = draw(st.integers(1, 600))
    lanes = draw(st.integers(1, min(size, 7)))
    window = draw(st.none() | st.integers(lanes, 40))
    return Cut(size, draw(st.integers(1, 90)), window, lanes)


@given(cuts(), seeds, epochs)
@settings(max_examples=300)
def test_windows_and_lanes_still_hold_every_sample_once_an_epoch(cut: Cut, seed: int, epoch: int) -> None:
    stream = cut.stream(seed)
    assert sorted(epoch_of(stream, epoch)) == list(range(cut.size))
    assert epoch_of(stream, epoch) == epoch_of(cut.stream(seed), epoch)


@given(cuts(), seeds, st.integers(0, 3000), st.integers(1, 200))
@settings(max_examples=100)
def test_windows_and_lanes_are_read_from_any_position(cut: Cut, seed: int, start: int, length: int) -> None:
    stream = cut.stream(seed)
    run = stream.samples(range(start, start + length)).tolist()
    assert run == [stream.sample(position) for position in range(start, start + length)]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def plans_of_one_batch(draw: st.DrawFn, count: int = 2) -> list[BatchPlan]:
    """The same global batch and lanes on different ranks, accumulations and micro-batches."""
    total = draw(st.sampled_from([6, 8, 12, 24, 36, 48]))
    lanes = draw(st.sampled_from(divisors(total)))
    plans = []
    for _ in range(count):
        ranks = draw(st.sampled_from(divisors(total)))
        accumulation = draw(st.sampled_from(divisors(total // ranks)))
        plans.append(BatchPlan(total, total // ranks // accumulation, accumulation, ranks, lanes))
    return plans


def trained_in(stream: SampleStream, plan: BatchPlan, step: int) -> list[int]:
    """Samples of one step, rank by rank."""
    parts = [
        stream.samples(plan.positions(rank, step * plan.accumulation + part))
        for rank in range(plan.world_size)
        for part in range(plan.accumulation)
    ]
    return [int(sample) for part in parts for sample in part]


@given(plans_of_one_batch(), st.integers(50, 600), st.integers(1, 90), st.integers(0, 40), seeds, st.integers(0, 100))
@settings(max_examples=200)
def test_windows_and_lanes_give_the_same_global_batches_on_any_ranks(
    plans: list[BatchPlan], size: int, block: int, extra: int, seed: int, step: int
) -> None:
    lanes = plans[0].lanes
    stream = Cut(size, block, lanes + extra, lanes).stream(seed)
    one, other = (trained_in(stream, plan, step) for plan in plans)
    total = plans[0].global_batch
    assert sorted(one) == sorted(other)
    assert sorted(one) == sorted(stream.samples(range(step * total, (step + 1) * total)).tolist())


@given(cuts(), seeds, st.integers(0, 50))
@settings(max_examples=150)
def test_a_window_reads_its_own_blocks_alone(cut: Cut, seed: int, epoch: int) -> None:
    """Each lane goes through its slots window by window, and a window of w slots lies in at most w // block + 2."""
    stream = cut.stream(seed)
    order = epoch_of(stream, epoch)
    window = cut.window if cut.window is not None else cut.size
    slots = -(-window * min(cut.block, cut.size) // cut.lanes)
    for lane in range(cut.lanes):
        samples = order[lane :: cut.lanes]
        for start in range(0, len(samples), slots):
            blocks = {sample // cut.block for sample in samples[start : start + slots]}
            assert len(blocks) <= min(slots, cut.size) // cut.block + 2


def test_a_window_is_no_larger_than_it_says_where_shards_are_equal() -> None:
    cut = Cut(size=6400, block=64, window=10, lanes=1)
    for epoch in range(3):
        order = np.array(epoch_of(cut.stream(), epoch)) // cut.block
        windows = order.reshape(10, 640)
        assert [len(set(blocks.tolist())) for blocks in windows] == [10] * 10
        # Mixed within the window, not read shard by shard.
        assert all(np.count_nonzero(np.diff(blocks)) > 500 for blocks in windows)


def test_windows_are_of_other_blocks_every_epoch() -> None:
    stream = Cut(size=6400, block=64, window=10, lanes=1).stream()
    first, second = (np.array(epoch_of(stream, epoch)[:640]) // 64 for epoch in (0, 1))
    assert set(first.tolist()) != set(second.tolist())
    assert set(np.diff(np.unique(first)).tolist()) != {1}


@pytest.mark.parametrize(("nodes", "ranks_a_node"), [(1, 4), (2, 2), (2, 4), (4, 2), (8, 1), (8, 4)])
def test_a_node_reads_its_part_of_a_window_alone(nodes: int, ranks_a_node: int) -> None:
    """Eight lanes of equal shards: a node of K meets 1/K of a window's shards, and no other node meets them."""
    lanes, block, window = 8, 32, 16
    world_size = nodes * ranks_a_node
    total, blocks = 64, 128
    stream = Cut(blocks * block, block, window, lanes).stream(3)
    plan = BatchPlan(total, total // world_size, 1, world_size, lanes)
    steps_a_window = window * block // total
    for number in range(2 * blocks // window):
        read: list[set[int]] = [set() for _ in range(nodes)]
        for step in range(number * steps_a_window, (number + 1) * steps_a_window):
            for rank in range(world_size):
                read[rank // ranks_a_node] |= set((stream.samples(plan.positions(rank, step)) // block).tolist())
        assert [len(shards) for shards in read] == [window // nodes] * nodes
        assert len(set().union(*read)) == window


@pytest.mark.parametrize("ranks", [3, 5, 6, 12])
def test_ranks_that_do_not_divide_the_lanes_still_read_few_of_them(ranks: int) -> None:
    plan = BatchPlan(120, 120 // ranks, 1, ranks, lanes=8)
    for rank in range(ranks):
        lanes = {position % 8 for position in plan.positions(rank, 7)}
        assert len(lanes) <= 8 // ranks + 2


@given(st.data())
@settings(max_examples=80)
def test_any_node_of_any_cluster_reads_its_share_of_a_window_and_little_more(data: st.DataObject) -> None:
    """Nodes need not divide the lanes: each reads those that its ranks' run of the sorted batch touches, no others."""
    lanes = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
    nodes, ranks_a_node = data.draw(st.sampled_from([(1, 4), (2, 3), (3, 2), (4, 1), (5, 2), (6, 1), (8, 1), (6, 4)]))
    world_size, window = nodes * ranks_a_node, lanes * data.draw(st.integers(1, 3))
    total = 120 if 120 % world_size == 0 and 120 % lanes == 0 else world_size * lanes
    # A window is at least a step long, so that a step meets one window of each lane, or two where one ends.
    block, windows = -(-total // window) + data.draw(st.integers(0, 30)), data.draw(st.integers(1, 5))
    stream = Cut(window * block * windows, block, window, lanes).stream(data.draw(st.integers(0, 99)))
    plan = BatchPlan(total, total // world_size, 1, world_size, lanes)
    step = data.draw(st.integers(0, 2 * windows * window * block // total))
    seen: list[int] = []
    for node in range(nodes):
        mine = [plan.positions(rank, step) for rank in range(node * ranks_a_node, (node + 1) * ranks_a_node)]
        positions = [position for of_rank in mine for position in of_rank]
        seen += positions
        touched = {position % lanes for position in positions}
        assert len(touched) <= -(-lanes // nodes) + 1
        blocks = {int(sample) // block for sample in stream.samples(positions)}
        assert len(blocks) <= len(touched) * 2 * (window // lanes + 2)
    assert sorted(seen) == list(range(step * total, (step + 1) * total))


def test_a_million_shards_over_thousands_of_ranks_are_planned_at_once_and_without_lists() -> None:
    """A billion samples, 512 lanes, 4096 ranks: the cost of a first batch is that of its own positions."""
    size, shard, ranks, lanes = 10**9, 1000, 4096, 512
    rank_numbers = [0, 1, 2047, 4095]
    stream_of(size, 0).sample(0)  # imports and caches, once
    tracemalloc.start()
    try:
        stream = SampleStream(range(size), 1, block=shard, window=4096, lanes=lanes)
        plan = BatchPlan(32 * ranks, 32, 1, ranks, lanes)
        batches = {rank: stream.samples(plan.positions(rank, 7_000_003)) for rank in rank_numbers}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for rank, samples in batches.items():
        assert len(set(samples.tolist())) == 32 and samples.min() >= 0 and samples.max() < size
        # Eight shards of its lane's window, and perhaps one at either end.
        assert len(set((samples // shard).tolist())) <= 10, rank
    assert peak < 200_000


@pytest.mark.parametrize(
    ("window", "lanes", "words"),
    [(None, 0, "data.lanes is 0"), (None, 101, "data.lanes is 101"), (3, 4, "data.window is 3 shards for 4 lanes")],
)
def test_lanes_and_windows_that_do_not_fit_are_refused(window: int | None, lanes: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SampleStream(range(100), 0, block=10, window=window, lanes=lanes)


def test_lanes_that_do_not_divide_the_global_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.lanes 5 does not divide the global batch 12"):
        BatchPlan(12, 12, 1, 1, lanes=5)


@given(cuts(), seeds, st.integers(0, 10**6), st.integers(0, 50))
@settings(max_examples=50)
def test_a_replacement_is_a_sample_of_the_set_and_always_the_same(
    cut: Cut, seed: int, position: int, attempt: int
) -> None:
    found = cut.stream(seed).replacement(position, attempt)
    assert 0 <= found < cut.size
    assert found == cut.stream(seed).replacement(position, attempt)


def test_replacements_differ_between_attempts_and_positions() -> None:
    stream = stream_of(10**6, 0)
    assert len({stream.replacement(position, attempt) for position in range(20) for attempt in range(20)}) == 400


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
