"""A shard set in; the figures that tell a person what it holds out, from its index and member records alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fcn_dist.data.shard import read_members
from fcn_dist.data.shardset import ShardSet


@dataclass(frozen=True)
class ClassShare:
    """How much of a split one class is."""

    label: int
    name: str
    colour: tuple[int, int, int]
    pixel_share: float  # of the labelled pixels, 0-1
    images: int


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class Description:
    """What one split holds."""

    split: str
    samples: int
    shards: int
    bytes: int
    height: Spread
    width: Spread
    short_side: Spread
    unlabelled_share: float  # of all pixels, those of label 0
    classes: tuple[ClassShare, ...]  # the largest first
    channel_mean: tuple[float, float, float]
    channel_std: tuple[float, float, float]
    created_by: dict[str, Any]


def describe(shard_set: ShardSet) -> Description:
    """The figures of one split; UserError if a shard's records cannot be read."""
    sizes = [np.stack([(m := read_members(shard))["height"], m["width"]]) for shard in shard_set.shards]
    heights, widths = np.concatenate(sizes, axis=1)
    unlabelled, *pixels = shard_set.class_pixels
    labelled = max(1, sum(pixels))
    classes = [
        ClassShare(label, name, colour, count / labelled, images)
        for label, (name, colour, count, images) in enumerate(
            zip(shard_set.classes, shard_set.colours, pixels, shard_set.class_images[1:], strict=True), 1
        )
    ]
    return Description(
        shard_set.split,
        len(shard_set),
        len(shard_set.shards),
        sum(shard.size for shard in shard_set.shards),
        _spread(heights),
        _spread(widths),
        _spread(np.minimum(heights, widths)),
        unlabelled / (unlabelled + sum(pixels)),
        tuple(sorted(classes, key=lambda c: (-c.pixel_share, c.label))),
        shard_set.channel_mean,
        shard_set.channel_std,
        shard_set.created_by,
    )


def _spread(values: "np.ndarray[Any, np.dtype[np.uint32]]") -> Spread:
    return Spread(int(values.min()), float(np.median(values)), int(values.max()))
