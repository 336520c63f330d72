"""Synthetic scenes: a seed in, a scenes folder in the layout of ADEChallengeData2016 out.

Every scene is a pure function of (seed, split, number, size), so a larger set begins with the smaller one.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.synthetic.bedroom import bedroom
from fcn_dist.data.synthetic.shapes import Canvas, Label
from fcn_dist.data.synthetic.street import street
from fcn_dist.data.synthetic.valley import valley
from fcn_dist.errors import UserError

SPLITS = ("training", "validation")
SMALLEST_SIDE = 48  # below this a scene's cars and paintings vanish
JPEG_QUALITY = 92

# Labels 1..N, by area as in the benchmark's table, with synonyms as it has them, and colours.
_TABLE = (
    ("wall", (196, 178, 150)),
    ("road, route", (92, 92, 102)),
    ("sky", (110, 178, 240)),
    ("mountain, mount", (148, 110, 92)),
    ("grass", (132, 204, 62)),
    ("building, edifice", (190, 84, 76)),
    ("tree", (26, 122, 52)),
    ("ceiling", (236, 230, 204)),
    ("floor, flooring", (150, 92, 42)),
    ("bed", (204, 62, 148)),
    ("water", (32, 84, 196)),
    ("car, auto, automobile, machine, motorcar", (232, 40, 48)),
    ("windowpane, window", (255, 234, 92)),
    ("painting, picture", (255, 146, 20)),
    ("sidewalk, pavement", (178, 146, 220)),
)
CLASSES = tuple(name for name, _ in _TABLE)
assert len(CLASSES) == len(Label) - 1

_KINDS: tuple[Callable[[Canvas, np.random.Generator], None], ...] = (street, bedroom, valley)


class Scene(NamedTuple):
    """One drawn scene."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    labels: NDArray[np.uint8]  # (H, W), 0 = other, 1..N
    category: str


def draw_scene(seed: int, split: str, number: int, size: tuple[int, int] = (160, 208)) -> Scene:
    """Draw scene `number` (from 1) of a split; each side is `size` (height, width) up to 15 % more or less."""
    rng = np.random.default_rng((seed, SPLITS.index(split), number))
    height, width = (round(side * rng.uniform(0.85, 1.15)) for side in size)
    # Kinds take turns, so that even a small set holds every class.
    draw_kind = _KINDS[number % len(_KINDS)]
    canvas = Canvas(height, width)
    draw_kind(canvas, rng)
    image, labels = canvas.develop(rng)
    return Scene(image, labels, draw_kind.__name__)


def render(
    out: Path, *, training: int = 96, validation: int = 24, size: tuple[int, int] = (160, 208), seed: int = 0
) -> None:
    """Write a scenes folder of synthetic scenes.

    `out` must not exist or be empty; `size` is the middle size as (height, width). The table of classes is
    written last, so that a folder with one is whole. Raises UserError for a folder in use and for arguments out
    of range.
    """
    _check(out, training, validation, size, seed)
    pixels = np.zeros(len(Label), np.int64)
    images = {split: np.zeros(len(Label), np.int64) for split in SPLITS}
    categories = []
    for split, count in zip(SPLITS, (training, validation), strict=True):
        for kind in ("images", "annotations"):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            stem = f"SYN_{split.removesuffix('ing').removesuffix('idation')}_{number:08d}"
            scene = draw_scene(seed, split, number, size)
            jpeg = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
            _write(out / "images" / split / f"{stem}.jpg", jpeg, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            _write(out / "annotations" / split / f"{stem}.png", scene.labels, [])
            found = np.bincount(scene.labels.ravel(), minlength=len(Label))
            pixels += found
            images[split] += found > 0
            categories.append(f"{stem} {scene.category}\n")
    (out / "color150.mat").write_bytes(_colours())
    (out / "sceneCategories.txt").write_text("".join(categories))
    (out / "objectInfo150.txt").write_text(_object_info(pixels, images["training"], images["validation"]))


def _check(out: Path, training: int, validation: int, size: tuple[int, int], seed: int) -> None:
    if training < 1 or validation < 0:
        raise UserError(
            f"{training} training and {validation} validation scenes cannot be rendered; at least 1 and 0 are "
            "needed; raise the count"
        )
    if min(size) < SMALLEST_SIDE:
        raise UserError(
            f"a size of {size[0]}x{size[1]} pixels is too small to draw on; at least {SMALLEST_SIDE} on each side "
            "are needed; choose a larger size"
        )
    if seed < 0:
        raise UserError(f"the seed {seed} is negative; 0 or more is needed; choose another seed")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; a new or empty folder is needed; choose another folder")
    if out.is_dir() and (first := next(out.iterdir(), None)) is not None:
        raise UserError(
            f"{out} is not empty (it holds {first.name}); a new or empty folder is needed; choose another folder, "
            "or remove this one"
        )


def _write(path: Path, picture: NDArray[np.uint8], options: list[int]) -> None:
    encoded, payload = cv2.imencode(path.suffix, picture, options)
    assert encoded, path
    path.write_bytes(payload.tobytes())


def _object_info(pixels: NDArray[np.int64], training: NDArray[np.int64], validation: NDArray[np.int64]) -> str:
    """The benchmark's table: share of all pixels, images of each split that hold the class, names."""
    lines = ["Idx\tRatio\tTrain\tVal\tName\n"]
    for label, name in enumerate(CLASSES, start=1):
        ratio = pixels[label] / pixels.sum()
        lines.append(f"{label}\t{ratio:.4f}\t{training[label]}\t{validation[label]}\t{name}\n")
    return "".join(lines)


def _colours() -> bytes:
    from scipy.io import savemat

    file = BytesIO()
    savemat(file, {"colors": np.array([colour for _, colour in _TABLE], np.uint8)})
    # The first 116 bytes are a free text, in which scipy puts the date: the same arguments give the same folder.
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]
