"""The planner's arithmetic. How right it is, benchmarks/planning.py measures."""

import json
from pathlib import Path

import pytest

from fcn_dist.config import ModelConfig
from fcn_dist.model.columns import CELLS_AT_ONCE
from fcn_dist.training.footprint import Footprint, Moment, Step, without_content
from fcn_dist.training.memoryplan import Held, Partition, Weights, held, largest_micro_batch, sent

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = Weights(135_000_000, 102_800_000)
EACH = 25_000_000  # bytes an image


def steps(each: int = EACH) -> Footprint:
    def of(images: int) -> Step:
        return Step(*(Moment(images * each, gradients) for gradients in (0, 30_000_000, 270_000_000)))

    return Footprint(of(8), of(16), (8, 16))


def bytes_a_parameter(stage: int, precision: str, ranks: int) -> Held:
    found = held(WEIGHTS, Partition(stage, precision, ranks, bucket=1), steps(0).step(1))
    return Held(*(size / WEIGHTS.all for size in vars(found).values()))


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "parameters", "gradients", "optimizer"),
    [
        (0, "float32", 1, 4, 4, 8),
        (0, "bfloat16", 4, 2, 2, 12),
        (1, "bfloat16", 4, 2, 0.5, 3),
        (1, "float32", 1, 4, 4, 12),  # ZeRO has masters in float32, too
        (2, "float16", 4, 2, 0.5, 3),
        (3, "bfloat16", 4, 0.5, 0.5, 3),
    ],
)
def test_what_adam_under_zero_holds(
    stage: int, precision: str, ranks: int, parameters: float, gradients: float, optimizer: float
) -> None:
    found = bytes_a_parameter(stage, precision, ranks)
    assert (found.parameters, found.gradients, found.optimizer) == pytest.approx((parameters, gradients, optimizer))


@pytest.mark.parametrize(("stage", "more"), [(0, 4), (1, 1), (3, 1)])
def test_averaged_weights_are_four_bytes_a_parameter_where_the_optimizer_is(stage: int, more: float) -> None:
    plain, averaged = (
        held(WEIGHTS, Partition(stage, "bfloat16", 4, averages=averages), steps().step(1)) for averages in (False, True)
    )
    assert (averaged.optimizer - plain.optimizer) / WEIGHTS.all == more
    assert averaged.most - plain.most == averaged.optimizer - plain.optimizer


def test_stage_1_keeps_whole_gradients_while_it_accumulates() -> None:
    found = held(WEIGHTS, Partition(1, "bfloat16", 4, accumulates=True), steps().step(1))
    assert found.gradients == 2 * WEIGHTS.all
    assert held(WEIGHTS, Partition(2, "bfloat16", 4, accumulates=True), steps().step(1)).gradients == WEIGHTS.all / 2


def test_by_columns_the_largest_weight_is_not_laid_out_but_for_its_gradient() -> None:
    """fc6 of half the width: 256 x 49 weights for each of 2048 outputs, and two columns of as many for each cell."""
    model = without_content(ModelConfig(width=0.5), 5)
    plain, by_columns = Weights.of(model), Weights.of(model, by_columns=True)
    assert plain.largest == by_columns.largest == 2048 * 256 * 49
    one = Partition(0, "float32", 1)
    more = held(plain, one, steps().step(8)).activations - held(by_columns, one, steps().step(8)).activations
    assert more == 4 * (2 * plain.largest - 2 * CELLS_AT_ONCE * 256 * 49)


def test_an_update_takes_the_norm_of_the_largest_weight_or_of_a_rank_s_part_in_float64() -> None:
    # In float32 and stage 0, beside weights, gradients and moments.
    found = bytes_a_parameter(0, "float32", 1)
    assert found.update == pytest.approx(4 + 4 + 8 + 8 * WEIGHTS.largest / WEIGHTS.all)
    # A quarter is less than the largest weight.
    assert bytes_a_parameter(1, "float32", 4).update == pytest.approx(4 + 12 / 4 + 4 / 4 + 8 / 4)


def test_two_buckets_are_filled_in_turn_while_communication_overlaps() -> None:
    one, two = (Partition.of({"stage": 2, "overlap_comm": overlap}, "bfloat16", 4) for overlap in (False, True))
    buffers = [held(WEIGHTS, partition, steps().step(1)).buffers for partition in (one, two)]
    assert buffers == [2 * 500_000_000, 2 * 2 * 500_000_000]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [5e9, 12e9, 80e9])
def test_the_largest_micro_batch_fits_and_one_more_does_not(stage: int, precision: str, memory: float) -> None:
    partition = Partition(stage, precision, 8)
    images = largest_micro_batch(WEIGHTS, partition, steps(), memory)
    assert images > 0
    assert held(WEIGHTS, partition, steps().step(images)).most <= memory
    assert held(WEIGHTS, partition, steps().step(images + 1)).most > memory


def test_none_fits_where_the_optimizer_alone_is_too_much() -> None:
    assert largest_micro_batch(WEIGHTS, Partition(0, "bfloat16", 8), steps(), 1.5e9) == 0


@pytest.mark.parametrize(
    ("stage", "micro_batches", "times"),
    [(0, 1, 2), (0, 4, 2), (1, 4, 2), (2, 1, 2), (2, 4, 5), (3, 1, 3), (3, 4, 12)],
)
def test_a_rank_sends_all_but_its_own_part_in_every_ring(stage: int, micro_batches: int, times: int) -> None:
    ring = 2 * WEIGHTS.all * 7 / 8
    assert sent(WEIGHTS, Partition(stage, "bfloat16", 8), micro_batches) == times * ring
    assert sent(WEIGHTS, Partition(stage, "bfloat16", 1), micro_batches) == 0


def test_a_partition_is_what_a_shipped_configuration_says() -> None:
    zero = json.loads((ROOT / "launch" / "zero" / "zero2_bf16.json").read_text())["zero_optimization"]
    assert Partition.of(zero, "bfloat16", 4) == Partition(2, "bfloat16", 4, 50_000_000)
    assert Partition.of({"stage": 1, "overlap_comm": True}, "float16", 2) == Partition(1, "float16", 2, buckets=2)
    assert Partition.of({}, "float32", 1) == Partition(0, "float32", 1)
