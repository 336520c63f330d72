"""Shards in; micro-batches out by this package: all that the benchmarks of loading and memory ask of it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from loading_crops import CONFIG, SEED, SIZE, constant, cut
from loading_peers import BATCH, rate

import fcn_dist.data.crops
from fcn_dist import SampleStream, ShardSet, pack
from fcn_dist.data.loader import Batch, build_loader
from fcn_dist.data.shard import Sample
from fcn_dist.data.transforms import decode
from fcn_dist.ranks import BatchPlan

SPLIT = "training"
ENDLESS = 10**6  # steps


def write_shards(scenes: str, out: str) -> dict[str, float]:
    """The scenes as our shards."""
    pack(scenes, out, (SPLIT,))
    return {}


def num_samples(data: str) -> int:
    """Samples of the shard set in folder `data`."""
    return len(_shard_set(data))


def _shard_set(data: str) -> ShardSet:
    return ShardSet.open(Path(data).parent, SPLIT)


def batches_from(data: str, workers: int, first: int = 0, last: int = ENDLESS) -> Iterator[Batch]:
    """The micro-batches of global steps first..last-1, one each."""
    shard_set = _shard_set(data)
    plan = BatchPlan(BATCH, BATCH, 1, 1)
    config = replace(CONFIG, workers=workers)
    return build_loader(shard_set, SampleStream(shard_set, SEED), plan, config, 0, range(first, last))


def load(data: str, workers: int, warmup: int, batches: int, without: str = "") -> dict[str, float]:
    """Images a second of our loader; `without` "decoding", or "reading" as well, those parts are left out."""
    with ExitStack() as stack:
        for change in _left_out(without):
            stack.enter_context(change)
        loader = batches_from(data, workers)
        return rate(((batch.images, batch.targets) for batch in loader), warmup, batches)


def _left_out(without: str) -> Iterator[Any]:
    if without == "decoding":
        yield patch.object(fcn_dist.data.crops, "decode", lambda sample, reduction: constant())
    if without == "reading":
        yield patch.object(fcn_dist.data.crops, "read_arrays", lambda *where: constant())
    if without:
        yield patch.object(fcn_dist.data.crops, "crop_into", lambda *arrays: None)


def first_batches(data: str, workers: int, tries: int) -> dict[str, list[float]]:
    """Milliseconds until a fresh loader gives its first batch: at the start of an epoch, and in its middle."""
    middle = num_samples(data) // BATCH // 2
    times: dict[str, list[float]] = {"start": [], "middle": []}
    for number in range(-1, tries):  # the first of all warms up
        for where, step in (("start", 0), ("middle", middle)):
            started = time.perf_counter()
            loader = batches_from(data, workers, step)
            next(loader)
            if number >= 0:
                times[where].append((time.perf_counter() - started) * 1e3)
            del loader
    return times


def alone(data: str, workers: int, batches: int, crop: bool) -> dict[str, float]:
    """Images a second of decoding, and cropping if `crop`, in plain processes: bytes in memory, nothing handed over."""
    shard_set = _shard_set(data)
    samples = [shard_set.read(index) for index in islice(range(len(shard_set)), 512)]
    context = get_context("fork")
    barrier, spans = context.Barrier(workers), context.SimpleQueue()
    count = batches * BATCH // workers
    work = partial(_work_alone, samples, count, crop, barrier, spans)
    processes = [context.Process(target=work, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    found = [spans.get() for _ in processes]
    for process in processes:
        process.join()
    starts, ends, worked = zip(*found, strict=True)
    return {
        "images/s": count * workers / (max(ends) - min(starts)),
        "CPU us an image": sum(worked) / workers / count * 1e6,
    }


def _work_alone(samples: list[Sample], count: int, crop: bool, barrier: Any, spans: Any, number: int) -> None:
    cv2.setNumThreads(0)
    images, masks = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8), np.zeros((BATCH, SIZE, SIZE), np.uint8)
    barrier.wait()
    started, worked = time.perf_counter(), time.process_time()
    for at in range(number * count, (number + 1) * count):
        if crop:
            cut(samples[at % len(samples)], at, images[at % BATCH], masks[at % BATCH])
        else:
            decode(samples[at % len(samples)])
    spans.put((started, time.perf_counter(), time.process_time() - worked))
