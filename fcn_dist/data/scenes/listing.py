"""A scenes folder in; its image and mask pairs out, as they are named. Nothing is decoded here."""

import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fcn_dist.errors import UserError

IMAGE_DIR, MASK_DIR = "images", "annotations"
IMAGE_SUFFIXES, MASK_SUFFIXES = (".jpg", ".jpeg"), (".png",)
SHOWN_PROBLEMS = 10


class SourceFile(NamedTuple):
    """One file as it was found."""

    path: Path
    size: int
    mtime_ns: int


class Pair(NamedTuple):
    """One image with its mask."""

    key: str
    image: SourceFile
    mask: SourceFile


class Problem(NamedTuple):
    """Why a file keeps the scenes from being packed."""

    path: Path
    kind: str
    detail: str


def sample_key(stem: str) -> str:
    """The key of the sample with this file stem: WebDataset splits names at the first dot, so dots are encoded."""
    return stem.replace("%", "%25").replace(".", "%2E")


def find_pairs(scenes_dir: Path, split: str) -> tuple[list[Pair], list[Problem]]:
    """The pairs of one split in the order of their names, and the files that make no pair.

    Raises UserError if the split's folders are missing or empty.
    """
    image_dir, mask_dir = (_split_dir(scenes_dir, kind, split) for kind in (IMAGE_DIR, MASK_DIR))
    images, problems = _files_by_key(image_dir, IMAGE_SUFFIXES)
    masks, mask_problems = _files_by_key(mask_dir, MASK_SUFFIXES)
    problems += mask_problems
    if not (images or masks or problems):
        raise UserError(f"{image_dir} and {mask_dir} are empty; a JPEG image and a PNG mask each scene are needed")
    for key in images.keys() - masks.keys():
        needed = mask_dir / f"{images[key].path.stem}.png"
        problems.append(Problem(images[key].path, "image without mask", f"{needed} is needed"))
    for key in masks.keys() - images.keys():
        needed = image_dir / f"{masks[key].path.stem}.jpg"
        problems.append(Problem(masks[key].path, "mask without image", f"{needed} is needed"))
    return [Pair(key, images[key], masks[key]) for key in sorted(images.keys() & masks.keys())], problems


def _split_dir(scenes_dir: Path, kind: str, split: str) -> Path:
    parent = scenes_dir / kind
    if not parent.is_dir():
        raise UserError(
            f"{scenes_dir} is no scenes folder: it has no folder {kind!r}; {IMAGE_DIR}/SPLIT/*.jpg and "
            f"{MASK_DIR}/SPLIT/*.png are needed; name the folder that holds both"
        )
    if not (parent / split).is_dir():
        found = ", ".join(sorted(p.name for p in parent.iterdir() if p.is_dir())) or "no splits"
        raise UserError(
            f"{parent} has no split {split!r}; it has {found}; choose among those with --split, or add that folder"
        )
    return parent / split


def _files_by_key(folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, SourceFile], list[Problem]]:
    files: dict[str, SourceFile] = {}
    problems = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        facts = _facts(path) if path.suffix.lower() in suffixes else None
        if facts is None:
            needed = f"only {' and '.join(suffixes)} files may stand there; save it as one, or move it elsewhere"
            problems.append(Problem(path, "foreign file or folder", needed))
            continue
        try:
            key = sample_key(path.stem)
            key.encode()
        except UnicodeEncodeError:
            problems.append(Problem(path, "name that is not UTF-8", "rename the file"))
            continue
        if key in files:
            detail = f"it makes the same sample as {files[key].path.name}; keep one of them"
            problems.append(Problem(path, "two files for one sample", detail))
        else:
            files[key] = SourceFile(path, facts.st_size, facts.st_mtime_ns)
    return files, problems


def _facts(path: Path) -> os.stat_result | None:
    try:
        facts = path.stat()
    except OSError:  # such as a link that leads nowhere
        return None
    return facts if stat.S_ISREG(facts.st_mode) else None


def refuse(scenes_dir: Path, problems: Iterable[Problem], written: str) -> None:
    """Raise one UserError that counts all problems by kind and names the first of them; none, no error.

    `written` says what became of the shards.
    """
    ordered = sorted(problems)
    if not ordered:
        return
    kinds = Counter(problem.kind for problem in ordered)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    lines = [f"  {p.path.relative_to(scenes_dir)}: {p.kind}: {p.detail}" for p in ordered[:SHOWN_PROBLEMS]]
    if len(ordered) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(ordered) - SHOWN_PROBLEMS} more")
    raise UserError(
        f"{scenes_dir} cannot be packed, and {written}; {len(ordered)} problem{'s' * (len(ordered) > 1)} ({counts}):\n"
        + "\n".join(lines)
        + "\nrepair or remove these files, then pack again"
    )
