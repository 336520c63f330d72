"""What more GPUs bring: a model on paper of a step's time, from what one GPU computes and what links carry.

A step computes, and sends what `memoryplan.sent` says by rings. A ring is as fast as its slowest link: that between
the GPUs of a host, or the network between hosts, of which one ring has all. DeepSpeed reduces a bucket when it is full
and waits for it, unless it is asked to overlap; so what is sent adds to the step, and none of it hides in computing.
What is left out: copies into buckets, latencies, and ranks that wait for each other. benchmarks/communication.py shows
how much that is.
"""

import math
from dataclasses import dataclass, replace

from fcn_dist.training.memoryplan import Partition, Weights, sent

WORTHWHILE = 0.9  # of the time spent computing
WORTH_DOUBLING = 1.5  # times the images a second, on twice the GPUs


@dataclass(frozen=True)
class Links:
    """Bytes a second that a GPU sends."""

    in_host: float
    between_hosts: float
    gpus_per_host: int

    def slowest(self, gpus: int) -> float:
        """Of a ring of so many."""
        return self.in_host if gpus <= self.gpus_per_host else min(self.in_host, self.between_hosts)


@dataclass(frozen=True)
class Work:
    """What one GPU does alone, in seconds."""

    image: float  # forward and backward
    update: float = 0.0  # of all weights, once a step


@dataclass(frozen=True)
class Step:
    """The time of a step on so many GPUs."""

    gpus: int
    images: int  # of all GPUs
    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.computing + self.sending

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return self.images / self.seconds

    @property
    def efficiency(self) -> float:
        """The share of the time in which GPUs compute."""
        return self.computing / self.seconds


def step(
    weights: Weights, partition: Partition, links: Links, work: Work, micro_batch: int, micro_batches: int = 1
) -> Step:
    """A step of `micro_batches` of `micro_batch` images on each of the partition's GPUs."""
    gpus = partition.world_size
    update = work.update / (gpus if partition.stage else 1)
    images = micro_batch * micro_batches
    seconds = sent(weights, partition, micro_batches) / links.slowest(gpus)
    return Step(gpus, images * gpus, images * work.image + update, seconds)


def largest_useful(weights: Weights, partition: Partition, links: Links, work: Work, global_batch: int) -> Step:
    """One global batch on as many GPUs as it is worth: doubling them up to there gives half as much speed again.

    Beyond that the batch is too small to be shared out. Counts of GPUs are powers of two.
    """
    best = step(weights, replace(partition, world_size=1), links, work, global_batch)
    while best.gpus * 2 <= global_batch:
        gpus = best.gpus * 2
        twice = step(weights, replace(partition, world_size=gpus), links, work, math.ceil(global_batch / gpus))
        if twice.images_per_second < WORTH_DOUBLING * best.images_per_second:
            break
        best = twice
    return best


def accumulation_for(
    weights: Weights, partition: Partition, links: Links, work: Work, micro_batch: int, efficiency: float
) -> int:
    """How many micro-batches a step takes, at least, until GPUs compute for that share of the time."""
    one = step(weights, partition, links, work, micro_batch)
    # Stages 0 and 1 send once a step, however much is accumulated.
    return max(1, math.ceil(efficiency / (1 - efficiency) * one.sending / one.computing))


def advice(
    weights: Weights, partition: Partition, links: Links, work: Work, micro_batch: int, global_batch: int | None
) -> list[str]:
    """What follows, in words, for a partition of stage 0 or 1."""
    gpus = partition.world_size
    here = step(weights, partition, links, work, micro_batch)
    lines = [
        f"On {gpus} GPU{'s' if gpus > 1 else ''} with micro-batches of {micro_batch}, "
        f"{here.images_per_second:,.0f} images a second: a GPU computes {here.efficiency:.0%} of the time, and sends "
        "for the rest."
    ]
    needed = accumulation_for(weights, partition, links, work, micro_batch, WORTHWHILE)
    if needed > 1:
        accumulated = step(weights, partition, links, work, micro_batch, needed)
        lines.append(
            f"Accumulating {needed} micro-batches makes that {accumulated.efficiency:.0%}, at a global batch of "
            f"{accumulated.images:,}: gradients are sent once a step."
        )
    if global_batch:
        most = largest_useful(weights, partition, links, work, global_batch)
        lines.append(
            f"The recipe's global batch of {global_batch} is worth up to {most.gpus} GPU{'s' if most.gpus > 1 else ''} "
            f"({most.images_per_second:,.0f} images a second); twice as many would not give half as many again."
        )
    return lines
