"""A scenes folder in; its pairs packed by the peers out, as their users write such a loop.

Each is run with three kinds of `work` on a pair: "copy" moves bytes and looks at nothing; "check" does what packing
here does (decode image and mask in full, refuse what is damaged or does not fit, count classes and channels, hash
the shards); "shrink" does that and encodes both anew with the short side shrunk. With more than one worker, every
process runs the loop over its share of the pairs, into shards of its own.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scenes_copies import PairPaths, find

from fcn_dist.data.scenes.class_info import read_classes

SAMPLES_PER_SHARD = 256  # as ours
SHORT_SIDE, QUALITY = 256, 95


class Encoded(NamedTuple):
    """What a writer is given."""

    key: str
    image: bytes
    mask: bytes


class Counts:
    """Pixels of each label, images in which it occurs, and the moments of R, G and B."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.class_pixels = np.zeros(256, np.int64)
        self.class_images = np.zeros(256, np.int64)
        self.channels = np.zeros((3, 256), np.int64)

    def add(self, picture: Image.Image, labels: Image.Image) -> None:
        """Raises ValueError if there is a label above the last class."""
        # Pillow's histogram is the quickest of the ways to count that its users have, three times np.bincount's pace.
        pixels = np.array(labels.histogram())
        if pixels[self.num_classes + 1 :].any():
            raise ValueError(f"a label above {self.num_classes}")
        self.class_pixels += pixels
        self.class_images += pixels > 0
        self.channels += np.reshape(picture.histogram(), (3, 256))


def shardwriter(scenes: str, out: str, work: str, workers: int = 1) -> dict[str, float]:
    """webdataset's ShardWriter."""
    import webdataset as wds

    Path(out).mkdir()

    def write(share: int, pairs: list[PairPaths]) -> None:
        pattern = f"{out}/training-{share}-%06d.tar"
        with wds.ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
            for one in _encoded(scenes, pairs, work):
                writer.write({"__key__": one.key, "jpg": one.image, "png": one.mask})
        if work != "copy":
            for path in sorted(Path(out).glob(f"training-{share}-*.tar")):
                with path.open("rb") as file:
                    hashlib.file_digest(file, "sha256").hexdigest()

    return _timed(scenes, write, workers)


def mdswriter(scenes: str, out: str, work: str, workers: int = 1) -> dict[str, float]:
    """mosaicml-streaming's MDSWriter; partitions of several processes are merged by its own function."""
    from streaming import MDSWriter
    from streaming.base.util import merge_index

    def write(share: int, pairs: list[PairPaths]) -> None:
        columns = {"key": "str", "image": "bytes", "mask": "bytes"}
        folder = f"{out}/{share}" if workers > 1 else out
        hashes = [] if work == "copy" else ["sha256"]
        with MDSWriter(out=folder, columns=columns, hashes=hashes) as writer:
            for one in _encoded(scenes, pairs, work):
                writer.write({"key": one.key, "image": one.image, "mask": one.mask})

    return _timed(scenes, write, workers, partial(merge_index, out) if workers > 1 else None)


def _timed(
    scenes: str,
    write: Callable[[int, list[PairPaths]], None],
    workers: int,
    finish: Callable[[], object] | None = None,
) -> dict[str, float]:
    # The peer's modules are imported by now; its users wait for that, too, but once a session.
    started = time.perf_counter()
    pairs = find(scenes)
    if workers == 1:
        write(0, pairs)
    else:
        # fork is the quickest start there is, and lets the loop be the closure it is.
        context = get_context("fork")
        shares = [pairs[len(pairs) * n // workers : len(pairs) * (n + 1) // workers] for n in range(workers)]
        processes = [context.Process(target=write, args=share) for share in enumerate(shares)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a process failed")
    if finish:
        finish()
    return {"seconds": time.perf_counter() - started}


def _encoded(scenes: str, pairs: Iterable[PairPaths], work: str) -> Iterator[Encoded]:
    counts = Counts(len(read_classes(Path(scenes))))
    for pair in pairs:
        one = Encoded(pair.key, pair.image.read_bytes(), pair.mask.read_bytes())
        yield one if work == "copy" else _checked(one, counts, shrink=work == "shrink")


def _checked(one: Encoded, counts: Counts, shrink: bool) -> Encoded:
    picture: Image.Image = Image.open(BytesIO(one.image))
    labels: Image.Image = Image.open(BytesIO(one.mask))
    picture.load()  # raises if it is damaged
    labels.load()
    if picture.mode != "RGB" or labels.mode != "L" or picture.size != labels.size:
        raise ValueError(f"{one.key}: {picture.mode} {picture.size} and {labels.mode} {labels.size}")
    if shrink and min(picture.size) > SHORT_SIDE:
        factor = SHORT_SIDE / min(picture.size)
        size = (round(picture.width * factor), round(picture.height * factor))
        picture = picture.resize(size, Image.Resampling.BOX)  # averages, as ours does
        labels = labels.resize(size, Image.Resampling.NEAREST)
        image, mask = BytesIO(), BytesIO()
        picture.save(image, "JPEG", quality=QUALITY, subsampling=0)
        labels.save(mask, "PNG")
        one = Encoded(one.key, image.getvalue(), mask.getvalue())
    counts.add(picture, labels)
    return one
