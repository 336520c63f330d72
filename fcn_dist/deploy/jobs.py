"""Images, folders and patterns in; which outputs belong to which image out, or why they cannot be written."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fcn_dist.errors import UserError, named
from fcn_dist.files import check_place

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".jp2", ".avif")
RECORD_NAME = "predictions.jsonl"  # a line an image


@dataclass(frozen=True)
class Job:
    """One image, and the files that are made of it."""

    image: Path
    labels: Path
    overlay: Path
    confidence: Path | None = None

    @property
    def outputs(self) -> tuple[Path, ...]:
        """All of them."""
        return tuple(path for path in (self.labels, self.overlay, self.confidence) if path)


@dataclass(frozen=True)
class Outputs:
    """What a command is to write: for each image under `folder`, and figures of all of them."""

    folder: Path
    overwrite: bool = False
    confidence: bool = False
    summary: Path | None = None
    kept: tuple[Path, ...] = ()  # files besides the images that are not to be written to

    @property
    def record(self) -> Path:
        """A line an image."""
        return self.folder / RECORD_NAME


def plan(inputs: Sequence[str], outputs: Outputs) -> tuple[list[Job], list[Path]]:
    """A job for each image given, found in a folder, or matching a pattern, at its place in the folder; and the files
    found there that are no images by their names.

    A pattern's folder is the part before its first wildcard. An image that several inputs name has one job.

    Raises UserError, before anything is written, if there are none, if two would write the same file, if one would
    overwrite an image or what is to be kept, if no file can be put there, or, unless `overwrite`, if an output exists.
    """
    folder = outputs.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a folder to write to is needed; choose another --output")
    others: dict[Path, None] = {}
    images = (pair for given in inputs for pair in _images(given, folder, others))
    found = {(image.resolve(), folder / stem): image for image, stem in images}
    jobs = [_job(image, base, outputs.confidence) for (_, base), image in found.items()]
    owners: dict[Path, str] = {}
    _claim(outputs.record, "the lines of all images", owners)
    if outputs.summary:
        _claim(outputs.summary, "--json", owners)
    for job in jobs:
        for output in job.outputs:
            _claim(output, str(job.image), owners)
    if outputs.summary and outputs.summary.parent.resolve() != folder.resolve():  # which will be made
        check_place(outputs.summary)
    kept = {path.resolve() for path in (*(job.image for job in jobs), *outputs.kept)}
    for output in owners:
        if output.resolve() in kept:
            raise UserError(f"{output} is to be read, and would be overwritten; choose another --output or --json")
        for parent in output.parents:
            if parent in owners:
                raise UserError(
                    f"{owners[parent]} would be written to {parent}, where {owners[output]} needs a folder; rename "
                    "one, or give them different output folders in two runs"
                )
        if output.exists():
            check_place(output)
    existing = [str(output) for output in owners if output.exists()]
    if existing and not outputs.overwrite:
        raise UserError(f"{named(existing)} exist already; choose another --output, or give --overwrite")
    named_too = {image for image, _ in found}
    return jobs, [path for path in others if path.resolve() not in named_too]


def _claim(output: Path, owner: str, owners: dict[Path, str]) -> None:
    """Raises UserError if it has an owner."""
    output = output.parent.resolve() / output.name  # however its folder is written; a link in its place is replaced
    if output in owners:
        raise UserError(
            f"{owners[output]} and {owner} would both be written to {output}; different names are needed; rename one, "
            "choose images with a pattern such as '*.jpg', or give them different output folders in two runs"
        )
    owners[output] = owner


def _images(given: str, output_dir: Path, others: dict[Path, None]) -> Iterator[tuple[Path, Path]]:
    """Images and their names without suffix, relative to the folder they were found in; what else is there is added to
    `others`.
    """
    path = Path(given)
    if not given:
        raise UserError("an image's name is empty; give images, folders with images, or patterns in quotes")
    if path.is_file():
        yield path, Path(path.stem)
        return
    if path.is_dir():
        folder, candidates = path, _below(path)
    elif glob.has_magic(given):
        folder = _before_wildcards(path)
        candidates = (Path(match) for match in glob.iglob(given, recursive=True))  # noqa: PTH207 - as a shell has **
    else:
        raise UserError(f"no image or folder {path}; give images, folders with images, or patterns in quotes")
    found = 0
    output_is_inside = folder.resolve() in output_dir.resolve().parents
    for image in sorted(candidates):
        hidden = any(part.startswith(".") for part in image.relative_to(folder).parts)
        # The outputs of an earlier run are no images to label.
        ours = output_is_inside and output_dir.resolve() in image.resolve().parents
        # A link to nothing is an image that cannot be read, and is told of when its turn comes.
        absent = image.is_symlink() and not image.exists()
        if hidden or ours or not (image.is_file() or absent):
            continue
        if image.suffix.lower() not in SUFFIXES:
            others[image] = None
            continue
        found += 1
        yield image, image.relative_to(folder).with_suffix("")
    if not found:
        what = f"folder {path} holds" if path.is_dir() else f"pattern {given} matches"
        raise UserError(f"{what} no images; files ending in {', '.join(SUFFIXES)} are looked for")


def _below(folder: Path) -> Iterator[Path]:
    """Files in it and in all folders below that are not hidden, also behind links out of it, each folder there once."""
    seen = {folder.resolve()}

    def unreadable(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}); make it readable, or move it away")

    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        yield from (Path(place, name) for name in names)
        entered = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            real = Path(place, name).resolve()
            leads_back = Path(place, name).is_symlink() and folder.resolve() in real.parents
            if real not in seen and not leads_back:
                seen.add(real)
                entered.append(name)
        folders[:] = entered


def _before_wildcards(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _job(image: Path, base: Path, confidence: bool) -> Job:
    # Names are added to: a stem may have dots, and with_suffix would cut it at the last.
    labels, overlay, sure = (base.with_name(base.name + end) for end in (".png", "_overlay.png", "_confidence.png"))
    return Job(image, labels, overlay, sure if confidence else None)
