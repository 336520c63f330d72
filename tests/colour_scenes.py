"""Scenes that can be read back from their pixels: red and green tell the label, blue tells the scene.

So a test knows which scene a pixel came from, and what its label must be, without asking the code under test.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

NUM_CLASSES = 4  # labels 0..4
# Red and green of each label, far enough apart that JPEG cannot confuse them.
LABEL_COLOURS = np.array([[30, 30], [30, 220], [220, 30], [220, 220], [125, 125]], np.int64)
BLUE_STEP = 14
MAX_SCENES = 18


def render(labels: Pixels, scene: int) -> Pixels:
    """The RGB image of a label map."""
    image = np.empty((*labels.shape, 3), np.uint8)
    image[..., :2] = LABEL_COLOURS[labels]
    image[..., 2] = 4 + BLUE_STEP * scene
    return image


def labels_of(image: Pixels) -> Pixels:
    """The label each pixel's colour stands for."""
    distance = np.abs(image[..., None, :2].astype(np.int64) - LABEL_COLOURS).sum(-1)
    labels: Pixels = distance.argmin(-1).astype(np.uint8)
    return labels


def scene_of(image: Pixels, inside: NDArray[np.bool_]) -> int:
    """The scene whose blue the pixels `inside` have."""
    return round((float(np.median(image[..., 2][inside])) - 4) / BLUE_STEP)


def away_from_edges(labels: Pixels, margin: int) -> NDArray[np.bool_]:
    """Pixels whose neighbourhood of `margin` holds one label."""
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    same: NDArray[np.bool_] = cv2.dilate(labels, kernel) == cv2.erode(labels, kernel)
    return same


def scene_sizes(count: int) -> list[tuple[int, int]]:
    """Height and width of each scene: tall, wide and small ones."""
    return [((60, 90), (75, 52), (24, 100), (33, 21), (128, 64))[scene % 5] for scene in range(count)]


def write_colour_scenes(
    root: Path,
    count: int,
    splits: tuple[str, ...] = ("training",),
    num_classes: int = NUM_CLASSES,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Path:
    """A scenes folder of `count` scenes a split, named `SPLIT_00`, `SPLIT_01` ..., labels 0..4 in every scene.

    More classes than NUM_CLASSES are listed, and occur nowhere. `sizes` are (height, width) of the scenes, if not those
    of `scene_sizes`.
    """
    assert count <= MAX_SCENES
    rng = np.random.default_rng(7)
    rows = "".join(f"{label}\t0.1\t10\t1\tclass {label}\n" for label in range(1, num_classes + 1))
    for split in splits:
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for scene, (height, width) in enumerate(sizes or scene_sizes(count)):
            blocks = rng.permutation(np.arange(6, dtype=np.uint8) % (NUM_CLASSES + 1)).reshape(2, 3)
            labels: Pixels = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)
            stem = f"{split}_{scene:02d}"
            quality = [cv2.IMWRITE_JPEG_QUALITY, 98, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
            image_path = root / "images" / split / f"{stem}.jpg"
            cv2.imwrite(str(image_path), np.ascontiguousarray(render(labels, scene)[..., ::-1]), quality)
            cv2.imwrite(str(root / "annotations" / split / f"{stem}.png"), labels)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    return root
