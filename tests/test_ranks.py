"""Rank arithmetic: any cut of a global batch covers the same positions, each once."""

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcn_dist.errors import UserError
from fcn_dist.ranks import BatchPlan, Rank, cores_of, cut_anew, env_int, plan_batches

small = st.integers(1, 9)


@given(small, small, small, st.integers(0, 10**12))
def test_the_ranks_of_a_step_cover_its_positions_once_and_in_order(
    micro_batch: int, accumulation: int, world_size: int, step: int
) -> None:
    size = micro_batch * accumulation * world_size
    plan = BatchPlan(size, micro_batch, accumulation, world_size)
    covered = [
        position
        for rank in range(world_size)
        for part in range(accumulation)
        for position in plan.positions(rank, step * accumulation + part)
    ]
    assert covered == list(range(step * size, (step + 1) * size))


@given(small, small, small)
def test_a_rank_owns_the_same_positions_however_it_accumulates(
    micro_batch: int, accumulation: int, world_size: int
) -> None:
    size = micro_batch * accumulation * world_size
    cut, whole = (
        BatchPlan(size, micro_batch, accumulation, world_size),
        BatchPlan(size, size // world_size, 1, world_size),
    )
    for rank in range(world_size):
        parts = [p for part in range(accumulation) for p in cut.positions(rank, 5 * accumulation + part)]
        assert parts == list(whole.positions(rank, 5))


@given(st.none() | small, st.none() | small, st.none() | small, small)
def test_whatever_is_left_open_is_filled_in_to_fit_what_is_given(
    total: int | None, micro_batch: int | None, accumulation: int | None, world_size: int
) -> None:
    fits = True
    if total is None:
        fits = micro_batch is not None
    else:
        fits = total % math.prod(n for n in (micro_batch, accumulation, world_size) if n) == 0
        if micro_batch and accumulation:
            fits = total == micro_batch * accumulation * world_size
    try:
        plan = plan_batches(total, micro_batch, accumulation, world_size)
    except UserError:
        assert not fits
        return
    assert fits
    assert plan.world_size == world_size
    assert plan.micro_batch * plan.accumulation * plan.world_size == plan.global_batch
    for given_size, found in (
        (total, plan.global_batch),
        (micro_batch, plan.micro_batch),
        (accumulation, plan.accumulation),
    ):
        assert given_size is None or given_size == found


@given(st.integers(1, 200), small, st.integers(1, 12), st.integers(0, 10**12), st.data())
def test_a_cut_made_anew_has_every_position_once_in_sizes_one_apart_and_as_few_parts_as_fit(
    total: int, most: int, world_size: int, step: int, data: st.DataObject
) -> None:
    try:
        plan = cut_anew(total, most, world_size)
    except UserError as error:
        assert -(-total // (most * world_size)) * world_size > total
        assert f"the global batch {total} cannot be cut for {world_size} ranks" in str(error)
        return
    parts = [
        plan.positions(rank, step * plan.accumulation + part)
        for rank in range(world_size)
        for part in range(plan.accumulation)
    ]
    assert [position for part in parts for position in part] == list(range(step * total, (step + 1) * total))
    sizes = {len(part) for part in parts}
    assert max(sizes) == plan.micro_batch <= most and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert plan.accumulation == 1 or -(-total // (world_size * (plan.accumulation - 1))) > most
    assert (plan.nominal_batch == total) == (len(sizes) == 1)
    lanes = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    in_lanes = cut_anew(total, most, world_size, lanes)
    places = [
        p for rank in range(world_size) for part in range(plan.accumulation) for p in in_lanes.positions(rank, part)
    ]
    assert sorted(places) == list(range(total)) and [p % lanes for p in places] == sorted(p % lanes for p in places)


@given(small, small, small)
def test_a_cut_made_anew_that_is_even_is_the_one_of_a_new_run(micro_batch: int, accumulation: int, ranks: int) -> None:
    total = micro_batch * accumulation * ranks
    assert cut_anew(total, micro_batch, ranks) == plan_batches(total, micro_batch, None, ranks)


def test_sixteen_images_on_six_ranks() -> None:
    plan = cut_anew(16, 2, 6)
    assert (plan.accumulation, plan.micro_batch, plan.nominal_batch) == (2, 2, 24)
    sizes = [[len(plan.positions(rank, part)) for part in range(2)] for rank in range(6)]
    assert sizes == [[1, 1], [2, 1], [1, 2], [1, 1], [2, 1], [1, 2]]


def test_more_micro_batches_than_images_are_refused_with_what_to_change() -> None:
    with pytest.raises(
        UserError, match=r"10 cannot be cut for 12 ranks: .* choose fewer ranks, or a larger train_micro"
    ):
        cut_anew(10, 5, 12)
    with pytest.raises(UserError, match=r"micro-batches of at most 1 need accumulation 4, and some of the 12 .* empty"):
        cut_anew(10, 1, 3)


def test_a_micro_batch_that_does_not_divide_is_answered_with_what_would() -> None:
    with pytest.raises(UserError, match=r"micro-batch 64 .* global batch 100 over 3 ranks; .* multiple of 192"):
        plan_batches(100, 64, None, 3)


def test_a_global_batch_smaller_than_the_ranks_is_refused_with_what_would_do() -> None:
    with pytest.raises(UserError, match=r"global batch 2 does not divide over 4 ranks .* multiple of 4"):
        plan_batches(2, None, None, 4)


def test_no_batch_size_at_all_is_refused_naming_both_places() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch.*train_micro_batch_size_per_gpu"):
        plan_batches(None, None, 2, 4)


def test_a_plan_that_does_not_multiply_out_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        BatchPlan(12, 5, 1, 2)


@pytest.mark.parametrize("local_name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_the_rank_is_read_from_deepspeed_s_and_torchrun_s_environment(
    monkeypatch: pytest.MonkeyPatch, local_name: str
) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local_name: "4"}.items():
        monkeypatch.setenv(name, value)
    assert Rank.from_environment() == Rank(5, 8, 1, 4)


def test_without_a_launcher_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Rank.from_environment() == Rank(0, 1, 0, 1)


def test_an_environment_variable_that_is_no_integer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        env_int("WORLD_SIZE", 1)


def test_cores_are_shared_among_the_ranks_of_a_node_and_never_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert [cores_of(Rank(0, n, 0, n)) for n in (1, 2, 4, 64)] == [6, 3, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cores_of(Rank(0, 4, 0, 4)) == 5
