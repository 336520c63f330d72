"""What a rank holds under DeepSpeed: a network's size and a footprint in, bytes and a micro-batch out.

How DeepSpeed 0.19.8 holds parameters, gradients and optimizer state was read off torch's allocator, by stage and
precision, with a fused Adam; benchmarks/planning.py measures it again.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fcn_dist.model.columns import CELLS_AT_ONCE
from fcn_dist.model.fcn import FCN
from fcn_dist.training.footprint import Footprint, Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bytes a parameter: in float32, Adam's two in float32, copied to float64 for a norm, and averaged (train.ema).
MASTER, MOMENTS, NORM, AVERAGE = 4, 8, 8, 4
DEFAULT_BUCKET = 500_000_000  # elements
# Of the largest weight, beside its gradient: the weight itself laid out for the convolution, and once more for its
# gradient, and the gradient laid out as DeepSpeed needs it.
LAYOUTS = 3
MOST = 1 << 16  # images; a search for the largest micro-batch ends there


class Weights(NamedTuple):
    """Of a network, in elements."""

    all: int
    largest: int
    layouts: int = LAYOUTS  # of the largest
    columns: int = 0  # in its stead, see columns.py

    @classmethod
    def of(cls, model: FCN, by_columns: bool = False) -> "Weights":
        """Those of `model`; `by_columns` says that fc6 is multiplied so, which lays out its gradient alone."""
        sizes = [parameter.numel() for parameter in model.parameters()]
        if not by_columns:
            return cls(sum(sizes), max(sizes))
        return cls(sum(sizes), max(sizes), 1, 2 * CELLS_AT_ONCE * model.fc6.weight[0].numel())


@dataclass(frozen=True)
class Partition:
    """What decides how DeepSpeed holds them."""

    stage: int
    precision: str  # "float32", "bfloat16" or "float16"
    world_size: int
    bucket: int = DEFAULT_BUCKET  # elements of a reduction
    buckets: int = 1  # that are filled in turn
    accumulates: bool = False  # over several micro-batches a step
    averages: bool = False  # the weights, see average.py

    @classmethod
    def of(
        cls, zero: dict[str, Any], precision: str, world_size: int, accumulates: bool = False, averages: bool = False
    ) -> "Partition":
        """As a configuration's section zero_optimization says."""
        stage = zero.get("stage", 0)
        bucket = int(zero.get("reduce_bucket_size", DEFAULT_BUCKET))
        buckets = 2 if zero.get("overlap_comm") else 1
        return cls(stage, precision, world_size, bucket, buckets, accumulates, averages)

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter in forward and backward."""
        return DTYPES[self.precision].itemsize

    def share(self, partitioned_from: int) -> float:
        """Of what is partitioned from that stage on, what a rank holds."""
        return 1 / self.world_size if self.stage >= partitioned_from else 1.0


@dataclass(frozen=True)
class Held:
    """Bytes on a rank at the two moments of a step at which it may hold most."""

    parameters: float
    gradients: float  # once all are there
    optimizer: float  # masters, moments and averages
    buffers: float  # of reductions, and of parameters that are gathered
    activations: float  # of the micro-batch; pixels, labels and what is laid out anew for a while with them
    backward: float  # all that is held, at most, in forward and backward
    update: float  # likewise while the optimizer works

    @property
    def most(self) -> float:
        """At any time."""
        return max(self.backward, self.update)


def held(weights: Weights, partition: Partition, step: Step) -> Held:
    """What a rank holds in a step."""
    size, largest = partition.itemsize, weights.largest * partition.itemsize
    masters = MASTER if partition.stage or partition.precision != "float32" else 0
    parameters = weights.all * size * partition.share(3)
    averages = AVERAGE if partition.averages else 0
    optimizer = weights.all * (masters + MOMENTS + averages) * partition.share(1)
    partitioned = partition.share(2 if partition.accumulates else 1)
    gradients = weights.all * size * partitioned
    buffers: float = partition.bucket * size * partition.buckets if partition.stage else 0
    if partition.stage == 3:
        # All are gathered in turn, beside a rank's own part, and let go late (stage3_max_live_parameters); the largest
        # is there once more while it is on its way; and gradients have a place that is never given back.
        buffers += (weights.all * size + largest if partition.world_size > 1 else 0) + gradients
    fixed = parameters + optimizer + buffers
    columns = weights.columns * size
    forward = step.forward.activations + (weights.layouts - 1) * largest + columns  # no gradient yet
    head = step.head.activations + step.head.gradients * partitioned + weights.layouts * largest + columns
    trunk = step.trunk.activations + step.trunk.gradients * partitioned
    # DeepSpeed's optimizer for stage 0 in 16 bits takes no norm in float64.
    norm = NORM * min(weights.largest, weights.all * partition.share(1)) if partition.stage or size == MASTER else 0
    in_float32 = MASTER * weights.all * partition.share(1) if masters and size < MASTER else 0
    flattened = weights.all * size * partition.share(1) if partition.stage in (1, 2) else 0
    update = parameters + optimizer + gradients + max(norm, in_float32 + flattened)
    activations = max(step.forward.activations, head - step.head.gradients * partitioned, step.trunk.activations)
    return Held(parameters, gradients, optimizer, buffers, activations, fixed + max(forward, head, trunk), update)


def largest_micro_batch(weights: Weights, partition: Partition, footprint: Footprint, memory: float) -> int:
    """The most images a micro-batch may have if a rank may hold `memory` bytes; 0 if not even one."""
    fits, too_many = 0, MOST + 1
    while too_many - fits > 1:
        images = (fits + too_many) // 2
        if held(weights, partition, footprint.step(images)).most <= memory:
            fits = images
        else:
            too_many = images
    return fits


def sent(weights: Weights, partition: Partition, micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step of so many micro-batches, by rings: each ring passes on all but its own part.

    Gradients of stages 0 and 1 are reduced once a step, those of 2 and 3 after every micro-batch; stage 3 gathers the
    parameters for each forward and each backward, stages 1 and 2 after the update.
    """
    ring = weights.all * partition.itemsize * (partition.world_size - 1) / partition.world_size
    if partition.stage <= 1:
        return 2 * ring
    if partition.stage == 2:
        return (micro_batches + 1) * ring
    return 3 * micro_batches * ring
