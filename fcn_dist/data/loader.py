"""Shards to batches: WebDataset stages in loader processes, two uint8 tensors a micro-batch out.

Stages are generators over an iterator. Which positions a process works on follows from its rank and worker number
alone; the batches arrive in the order of their micro-steps.

Shapes: B images of a micro-batch, H x W the crop (training) or the sample's own size (evaluation).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from fcn_dist.config import DataConfig
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.transforms import crop_into, decode, draw_window, generator
from fcn_dist.errors import UserError
from fcn_dist.keys import Purpose
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.ranks import BatchPlan, Rank

PREFETCHED_BATCHES = 4  # a loader process, so that one slow image does not stall a step


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    images: Tensor  # (B, H, W, 3) uint8, RGB
    targets: Tensor  # (B, H, W) uint8, IGNORE_LABEL where nothing is learned
    labelled: int  # pixels that are not ignored
    positions: tuple[int, ...]  # stream positions of the images

    def pin_memory(self) -> "Batch":
        """Its tensors in page-locked memory; torch's loader calls it where copies go to a GPU."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


class Scene(NamedTuple):
    """One sample at its own size, for evaluation."""

    key: str
    image: Tensor  # (1, H, W, 3) uint8, RGB
    labels: Tensor  # (H, W) uint8, raw labels


def build_loader(
    shard_set: ShardSet,
    stream: SampleStream,
    plan: BatchPlan,
    config: DataConfig,
    rank: int,
    steps: range,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The micro-batches that `rank` trains in global steps `steps`, in order.

    Starting in the middle of an epoch costs no more than at its start. Errors of loader processes are raised here
    as they were there.
    """
    table = np.frombuffer(shard_set.label_rule(config.score_other).target_table, np.uint8)
    fill = np.rint(shard_set.channel_mean).astype(np.uint8)

    def micro_batches() -> Iterator[tuple[int, ...]]:
        worker, workers = _worker()
        first, last = steps.start * plan.accumulation, steps.stop * plan.accumulation
        for micro_step in range(first + worker, last, workers):
            yield plan.positions(rank, micro_step)

    def load(batches: Iterable[tuple[int, ...]]) -> Iterator[Batch]:
        for positions in batches:
            images = np.empty((len(positions), *config.crop, 3), np.uint8)
            masks = np.full((len(positions), *config.crop), IGNORE_LABEL, np.uint8)
            images[:] = fill
            for row, (position, index) in enumerate(zip(positions, stream.samples(positions), strict=True)):
                image, mask = decode(shard_set.read(int(index)))
                rng = generator(stream.seed, position, Purpose.CROP)
                window = draw_window(rng, mask.shape[0], mask.shape[1], config)
                # Labels become targets before they are placed, so padding is ignored whatever the rule.
                crop_into(window, image, table[mask], images[row], masks[row])
            labelled = int(np.count_nonzero(masks != IGNORE_LABEL))
            yield Batch(torch.from_numpy(images), torch.from_numpy(masks), labelled, positions)

    return _run(wds.DataPipeline(micro_batches, load, _errors_as_items), config.workers, pin_memory)


def build_scene_loader(shard_set: ShardSet, rank: Rank, workers: int) -> Iterator[Scene]:
    """Every world_size-th sample of the set, from sample `rank.index` on, each once and at its own size."""

    def indices() -> Iterator[int]:
        worker, count = _worker()
        yield from range(rank.index + worker * rank.world_size, len(shard_set), count * rank.world_size)

    def load(samples: Iterable[int]) -> Iterator[Scene]:
        for index in samples:
            sample = shard_set.read(index)
            image, mask = decode(sample)
            yield Scene(sample.key, torch.from_numpy(image)[None], torch.from_numpy(mask))

    share = math.ceil((len(shard_set) - rank.index) / rank.world_size)
    return _run(wds.DataPipeline(indices, load, _errors_as_items), min(workers, max(share, 0)), False)


def _run(pipeline: Any, workers: int, pin_memory: bool) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        pipeline,
        batch_size=None,  # the pipeline batches
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        worker_init_fn=_start_worker,
        # The stages are closures, and the shard set is open already: both are inherited, not sent.
        multiprocessing_context="fork" if workers else None,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _errors_as_items(items: Iterable[Any]) -> Iterator[Any]:
    """Pass a UserError on as the last item: raised in a loader process, it would arrive wrapped in a traceback."""
    try:
        yield from items
    except UserError as error:
        yield error


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _start_worker(_: int) -> None:
    # One thread each: OpenCV's pool does not survive a fork, and the processes are the parallelism.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _as_it_is(item: Any) -> Any:
    return item
