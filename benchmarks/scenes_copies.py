"""A scenes folder in; a scratch folder of the same layout out, its pairs linked several times under other names.

A few hundred images are packed in less than a second, and end in the middle of a measurement of loading. Copies are
links: the same real images, read by the same system calls.
"""

from pathlib import Path
from typing import NamedTuple

SPLIT = "training"
IMAGE_DIR, MASK_DIR = "images", "annotations"


class PairPaths(NamedTuple):
    """An image and its mask."""

    key: str
    image: Path
    mask: Path


def link_copies(scenes: Path, folder: Path, copies: int) -> list[PairPaths]:
    """Make `folder` hold `copies` of the training pairs of `scenes`; returns them in the order of their names."""
    for kind in (IMAGE_DIR, MASK_DIR):
        (folder / kind / SPLIT).mkdir(parents=True)
    for path in scenes.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    for image in sorted((scenes / IMAGE_DIR / SPLIT).iterdir()):
        mask = scenes / MASK_DIR / SPLIT / f"{image.stem}.png"
        for copy in range(copies):
            name = f"{copy:03d}_{image.stem}"
            (folder / IMAGE_DIR / SPLIT / f"{name}.jpg").symlink_to(image.resolve())
            (folder / MASK_DIR / SPLIT / f"{name}.png").symlink_to(mask.resolve())
    return find(folder)


def find(scenes: Path | str) -> list[PairPaths]:
    """The training pairs in the order of their names."""
    masks = Path(scenes) / MASK_DIR / SPLIT
    images = sorted((Path(scenes) / IMAGE_DIR / SPLIT).iterdir())
    return [PairPaths(path.stem, path, masks / f"{path.stem}.png") for path in images]
