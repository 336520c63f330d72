"""Shards to batches: WebDataset stages in loader processes, two uint8 tensors a micro-batch out.

Stages are generators over an iterator. Which positions a process works on follows from its rank and worker number
alone; the batches arrive in the order of their micro-steps.

Shapes: B images of a micro-batch, H x W the crop (training) or the sample's own size (evaluation).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from fcn_dist.config import DataConfig
from fcn_dist.data.crops import BadSample, CropReader, read_arrays
from fcn_dist.data.forking import ThreadedForkContext
from fcn_dist.data.handoff import Place, Slots
from fcn_dist.data.loaderprocesses import started
from fcn_dist.data.loadersignals import leave_stopping_to_the_parent
from fcn_dist.data.members import member_key
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.upcoming import read_ahead
from fcn_dist.errors import UserError
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.ranks import BatchPlan, Rank

SHARDS_AHEAD = 2  # of a remote set, in evaluation, which goes through it in order
PREFETCHED_BATCHES = 4  # a loader process, so that one slow image does not stall a step


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    images: Tensor  # (B, H, W, 3) uint8, RGB
    targets: Tensor  # (B, H, W) uint8, IGNORE_LABEL where nothing is learned
    labelled: int  # pixels that are not ignored
    positions: tuple[int, ...]  # stream positions of the images
    bad_samples: tuple[BadSample, ...] = ()  # what was to stand there, and has been replaced


class Filled(NamedTuple):
    """A micro-batch as a loader process passes it on."""

    place: Place | None  # where its tensors lie, if not in `tensors`
    tensors: tuple[Tensor, Tensor] | None
    labelled: int
    positions: tuple[int, ...]
    bad_samples: tuple[BadSample, ...]


class Scene(NamedTuple):
    """One sample at its own size, for evaluation."""

    key: str
    image: Tensor  # (1, H, W, 3) uint8, RGB
    labels: Tensor  # (H, W) uint8, raw labels
    number: int  # in the set, from 0


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
    as they were there; EarlyEnd if one was killed.
    """
    crops = CropReader(shard_set, stream, config)
    slots = Slots(config.workers, PREFETCHED_BATCHES + 2, plan.micro_batch, config.crop) if config.workers else None

    def micro_batches() -> Iterator[tuple[int, ...]]:
        worker, workers = _worker()
        first, last = steps.start * plan.accumulation, steps.stop * plan.accumulation
        for micro_step in range(first + worker, last, workers):
            yield plan.positions(rank, micro_step)

    def load(batches: Iterable[tuple[int, ...]]) -> Iterator[Filled]:
        worker, _ = _worker()
        ahead = read_ahead(shard_set, map(stream.samples, micro_batches()), config.read_ahead)
        for number, positions in enumerate(batches):
            if ahead:
                ahead.advance(number)
            place = Place(worker, number, len(positions))
            if slots and slots.free(place):
                images, targets = slots.arrays(place)
                tensors = None
            else:
                images = np.empty((len(positions), *config.crop, 3), np.uint8)
                targets = np.empty((len(positions), *config.crop), np.uint8)
                tensors = torch.from_numpy(images), torch.from_numpy(targets)
            bad = crops.fill(positions, images, targets)
            labelled = int(np.count_nonzero(targets != IGNORE_LABEL))
            yield Filled(None if tensors else place, tensors, labelled, positions, bad)

    for filled in _run(wds.DataPipeline(micro_batches, load, _errors_as_items), config.workers):
        if filled.tensors:
            images, targets = (tensor.pin_memory() if pin_memory else tensor for tensor in filled.tensors)
        else:
            assert slots and filled.place
            images, targets = slots.take(filled.place, pin_memory)
        yield Batch(images, targets, *filled[2:])


def build_scene_loader(shard_set: ShardSet, rank: Rank, workers: int, limit: int | None = None) -> Iterator[Scene]:
    """Every world_size-th sample of the set, or of its first `limit`, each once and at its own size.

    A rank begins with sample `rank.index`.
    """
    samples = len(shard_set) if limit is None else min(limit, len(shard_set))

    def indices() -> Iterator[int]:
        worker, count = _worker()
        yield from range(rank.index + worker * rank.world_size, samples, count * rank.world_size)

    def load(samples: Iterable[int]) -> Iterator[Scene]:
        ahead = read_ahead(shard_set, (np.array([index]) for index in indices()), SHARDS_AHEAD)
        for number, index in enumerate(samples):
            if ahead:
                ahead.advance(number)
            shard, record = shard_set.locate(index)
            image, mask = read_arrays(shard_set, shard, record)
            yield Scene(member_key(record), torch.from_numpy(image)[None], torch.from_numpy(mask), index)

    share = math.ceil((samples - rank.index) / rank.world_size)
    return _run(wds.DataPipeline(indices, load, _errors_as_items), min(workers, max(share, 0)))


def _run(pipeline: Any, workers: int) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        pipeline,
        batch_size=None,  # the pipeline batches
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        worker_init_fn=_start_worker,
        # The stages are closures, and the shard set is open already: both are inherited, not sent.
        multiprocessing_context=ThreadedForkContext() if workers else None,
    )
    for item in started(loader):
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
    leave_stopping_to_the_parent()
    # One thread each: OpenCV's pool does not survive a fork, and the processes are the parallelism.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _as_it_is(item: Any) -> Any:
    return item
