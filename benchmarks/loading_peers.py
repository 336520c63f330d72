"""Packed data in; micro-batches of 32 crops out, by the peers' loaders as their users write them.

`crop` is a key of `loading_crops.CROPS`. The data is long enough that no epoch ends within a measurement.
"""

import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import torch
from loading_crops import CROPS, SIZE, Pixels, augment, start_worker
from PIL import Image
from scenes_copies import PairPaths, find
from torch.utils.data import DataLoader, Dataset, IterableDataset

BATCH = 32
SHUFFLE_BUFFER = 1000  # samples that webdataset shuffles among


def folder(data: str, crop: str, workers: int, warmup: int, batches: int) -> dict[str, float]:
    """A torch data set over the scenes folder."""
    way = CROPS[crop]

    class Scenes(Dataset[tuple[Pixels, Pixels]]):
        def __init__(self) -> None:
            self.pairs = find(data)

        def __len__(self) -> int:
            return len(self.pairs)

        def __getitem__(self, index: int) -> tuple[Pixels, Pixels]:
            pair = self.pairs[index]
            return way(pair.image.read_bytes(), pair.mask.read_bytes())

    loader = DataLoader(Scenes(), BATCH, shuffle=True, num_workers=workers, worker_init_fn=start_worker, drop_last=True)
    return rate(loader, warmup, batches)


def webdataset(data: str, crop: str, workers: int, warmup: int, batches: int) -> dict[str, float]:
    """The usual webdataset pipeline over tar shards; it reads ours."""
    import webdataset as wds

    shards = sorted(str(path) for path in Path(data).glob("*.tar"))
    pipeline = wds.WebDataset(shards, shardshuffle=len(shards), workersplitter=wds.split_by_worker).shuffle(
        SHUFFLE_BUFFER
    )
    if crop == "Pillow":
        # "pil" alone would turn the mask into RGB.
        pipeline = pipeline.decode(wds.handle_extension("png", _gray), "pil").to_tuple("jpg", "png")
        pipeline = pipeline.map(lambda pair: augment(*pair))
    else:
        way = CROPS[crop]
        pipeline = pipeline.to_tuple("jpg", "png").map(lambda pair: way(*pair))
    loader = wds.WebLoader(pipeline.batched(BATCH), batch_size=None, num_workers=workers, worker_init_fn=start_worker)
    return rate(loader, warmup, batches)


def _gray(data: bytes) -> Image.Image:
    picture = Image.open(BytesIO(data))
    picture.load()
    return picture


def mosaicml(data: str, crop: str, workers: int, warmup: int, batches: int) -> dict[str, float]:
    """mosaicml-streaming's data set over a local MDS folder, under torch's loader."""
    from streaming import StreamingDataset

    way = CROPS[crop]

    class Scenes(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[Pixels, Pixels]:
            sample = super().__getitem__(at)
            return way(sample["image"], sample["mask"])

    scenes = Scenes(local=data, shuffle=True, batch_size=BATCH)
    return rate(DataLoader(scenes, BATCH, num_workers=workers, worker_init_fn=start_worker), warmup, batches)


def litdata(data: str, crop: str, workers: int, warmup: int, batches: int) -> dict[str, float]:
    """litdata's data set over a local optimized folder, under its own loader."""
    from litdata import StreamingDataLoader, StreamingDataset

    way = CROPS[crop]

    class Scenes(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Pixels, Pixels]:
            sample = super().__getitem__(index)
            return way(sample["image"], sample["mask"])

    scenes = Scenes(data, shuffle=True)
    loader = StreamingDataLoader(scenes, batch_size=BATCH, num_workers=workers, worker_init_fn=start_worker)
    return rate(loader, warmup, batches)


def hand_over(workers: int, warmup: int, batches: int) -> dict[str, float]:
    """torch's loader handing over one and the same batch: the ceiling of every loader that is built on it."""

    class Same(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            images = torch.zeros((BATCH, SIZE, SIZE, 3), dtype=torch.uint8)
            labels = torch.zeros((BATCH, SIZE, SIZE), dtype=torch.uint8)
            while True:
                # A new tensor each time: one that is in shared memory already would not be copied there again.
                yield images.clone(), labels.clone()

    return rate(DataLoader(Same(), batch_size=None, num_workers=workers), warmup, batches)


def rate(loader: Iterable[Any], warmup: int, batches: int) -> dict[str, float]:
    """Images a second over `batches`, after `warmup` of them; each must be what is trained on.

    And the processor time of an image in all processes, which other programs on the machine disturb less.
    """
    batches_of = iter(loader)
    for _ in range(warmup):
        images, labels, *_ = next(batches_of)
    assert images.shape == (BATCH, SIZE, SIZE, 3), images.shape
    assert labels.shape == (BATCH, SIZE, SIZE), labels.shape
    assert images.dtype == labels.dtype == torch.uint8, (images.dtype, labels.dtype)
    started, worked = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        images, labels, *_ = next(batches_of)
    count = batches * BATCH
    return {
        "images/s": count / (time.perf_counter() - started),
        "CPU us an image": (cpu_seconds() - worked) / count * 1e6,
    }


def cpu_seconds() -> float:
    """Processor time of this process and all below it so far."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(float(one.user + one.system) for one in times)


def write_mds(scenes: str, out: str) -> dict[str, float]:
    """The scenes as MDS shards."""
    from streaming import MDSWriter

    with MDSWriter(out=out, columns={"image": "bytes", "mask": "bytes"}) as writer:
        for pair in find(scenes):
            writer.write(_encoded(pair))
    return {}


def write_litdata(scenes: str, out: str) -> dict[str, float]:
    """The scenes as litdata's chunks."""
    from litdata import optimize

    optimize(fn=_encoded, inputs=find(scenes), output_dir=out, chunk_bytes="64MB", num_workers=1)
    return {}


def _encoded(pair: PairPaths) -> dict[str, bytes]:
    return {"image": pair.image.read_bytes(), "mask": pair.mask.read_bytes()}
