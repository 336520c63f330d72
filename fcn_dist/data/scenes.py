"""A scenes folder in; its image and mask pairs out, each checked before anything is made of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar
from zlib import crc32

from fcn_dist.data.images import FileProblem, ImageRead, read_image
from fcn_dist.data.masks import MaskRead, read_mask
from fcn_dist.data.pairs import PairRead, PairRules
from fcn_dist.data.workers import map_in_processes
from fcn_dist.errors import UserError

IMAGE_DIR, MASK_DIR = "images", "annotations"
IMAGE_SUFFIXES, MASK_SUFFIXES = (".jpg", ".jpeg"), (".png",)
SHOWN_PROBLEMS = 10
_CHUNK = 16  # pairs a job

Read = TypeVar("Read", ImageRead, MaskRead)


@dataclass(frozen=True)
class Pair:
    """One image with its mask, as found."""

    key: str
    image_path: Path
    mask_path: Path


@dataclass(frozen=True)
class CheckedPair:
    """A pair that may be packed, and what checking it has shown."""

    pair: Pair
    image_crc32: int  # of the file, so that packing notices a change in between
    mask_crc32: int
    height: int  # as it will be packed
    width: int
    conversions: tuple[str, ...]  # what packing must convert; if empty, the bytes are copied
    num_bytes: int


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
        needed = mask_dir / f"{images[key].stem}.png"
        problems.append(Problem(images[key], "image without mask", f"{needed} is needed"))
    for key in masks.keys() - images.keys():
        needed = image_dir / f"{masks[key].stem}.jpg"
        problems.append(Problem(masks[key], "mask without image", f"{needed} is needed"))
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


def _files_by_key(folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, Path], list[Problem]]:
    files: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_file() or path.suffix.lower() not in suffixes:
            needed = f"only {' and '.join(suffixes)} files may stand there; move it elsewhere"
            problems.append(Problem(path, "foreign file or folder", needed))
            continue
        try:
            key = sample_key(path.stem)
            key.encode()
        except UnicodeEncodeError:
            problems.append(Problem(path, "name that is not UTF-8", "rename the file"))
            continue
        if key in files:
            detail = f"it makes the same sample as {files[key].name}; keep one of them"
            problems.append(Problem(path, "two files for one sample", detail))
        else:
            files[key] = path
    return files, problems


def check_pairs(pairs: Sequence[Pair], rules: PairRules, workers: int) -> tuple[list[CheckedPair], list[Problem]]:
    """Decode every pair in full; returns those that may be packed, in the given order, and all problems."""
    chunks = [(list(pairs[i : i + _CHUNK]), rules) for i in range(0, len(pairs), _CHUNK)]
    results = map_in_processes(_check_chunk, chunks, workers, "checking", [len(chunk) for chunk, _ in chunks])
    checked: list[CheckedPair] = []
    problems: list[Problem] = []
    for result in (result for chunk in results for result in chunk):
        if isinstance(result, CheckedPair):
            checked.append(result)
        else:
            problems += result
    return checked, problems


def _check_chunk(job: tuple[list[Pair], PairRules]) -> list[CheckedPair | list[Problem]]:
    pairs, rules = job
    return [_check_pair(pair, rules) for pair in pairs]


def _check_pair(pair: Pair, rules: PairRules) -> CheckedPair | list[Problem]:
    problems: list[Problem] = []

    def read(path: Path, decode: Callable[[bytes], Read]) -> Read | None:
        try:
            return decode(path.read_bytes())
        except OSError as error:
            problems.append(Problem(path, "unreadable file", f"{error.strerror}; make it readable"))
        except FileProblem as problem:
            problems.append(Problem(path, problem.kind, problem.detail))
        return None

    # Both are read whatever becomes of the other, so that all problems come out in one run.
    image = read(pair.image_path, lambda data: read_image(data, rules.max_pixels))
    mask = read(pair.mask_path, lambda data: read_mask(data, rules.num_classes, rules.max_pixels))
    if image is None or mask is None:
        return problems
    try:
        joined = PairRead.join(image, mask, rules)
    except FileProblem as problem:
        return [Problem(pair.image_path, problem.kind, problem.detail)]
    num_bytes = len(image.data) + len(mask.data)
    return CheckedPair(pair, crc32(image.data), crc32(mask.data), *joined.size, joined.conversions, num_bytes)


def refuse(scenes_dir: Path, problems: Iterable[Problem]) -> None:
    """Raise one UserError that counts all problems by kind and names the first of them; none, no error."""
    ordered = sorted(problems)
    if not ordered:
        return
    kinds = Counter(problem.kind for problem in ordered)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    lines = [f"  {p.path.relative_to(scenes_dir)}: {p.kind}: {p.detail}" for p in ordered[:SHOWN_PROBLEMS]]
    if len(ordered) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(ordered) - SHOWN_PROBLEMS} more")
    raise UserError(
        f"{scenes_dir} cannot be packed, and nothing was written; {len(ordered)} problems ({counts}):\n"
        + "\n".join(lines)
        + "\nrepair or remove these files, then pack again"
    )
