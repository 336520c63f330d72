"""`predict`: a model file and images in; label maps, overlays and figures out."""

import argparse
import errno
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from fcn_dist.commands.anywhere import parse_anywhere
from fcn_dist.commands.termination import unwound_by_sigterm
from fcn_dist.commands.views import add_views, views_of
from fcn_dist.console import console
from fcn_dist.deploy.colours import distinct
from fcn_dist.deploy.imagefiles import read_rgb
from fcn_dist.deploy.jobs import RECORD_NAME, Job, Outputs, plan
from fcn_dist.deploy.pictures import picture_with_legend, short_name, write_png
from fcn_dist.deploy.predict import AUTO, PRECISIONS, Predictor, classes_found
from fcn_dist.errors import UserError, counted, named
from fcn_dist.files import naming, replacing, write_text
from fcn_dist.model.devices import keep_freed_memory, out_of_memory
from fcn_dist.progress import count_progress

SHOWN_CLASSES = 10
# Pixels of the images that are computed together. Small ones are faster together; from some 300x300 on, one image
# keeps all cores of a CPU busy by itself. A network at full width needs about 700 bytes a pixel.
TOGETHER = 512 * 512

WAITING = 8_000_000  # pixels of images that are read and wait for others of their size

Record = dict[str, Any]
Read = tuple[Job, NDArray[np.uint8]]  # an image and its pixels


@dataclass
class Outcome:
    """What came of all images."""

    figures: list[Record] = field(default_factory=list)  # one an image
    failures: dict[str, str] = field(default_factory=dict)  # image -> why


class Labelling:
    """Labels images as they come, and writes what came of each; those of one size wait for each other, for a while."""

    def __init__(self, predictor: Predictor, record: BinaryIO) -> None:
        self.outcome = Outcome()
        self._predictor, self._record = predictor, record
        self._colours = distinct(predictor.colours)
        self._waiting: dict[tuple[int, ...], list[Read]] = {}  # by size

    def add(self, job: Job) -> None:
        """Read an image; one that cannot be read does not stop the others."""
        try:
            image = read_rgb(job.image)
        except UserError as error:
            self._failed(job, str(error))
            return
        together = self._waiting.setdefault(image.shape, [])
        together.append((job, image))
        if (len(together) + 1) * image[..., 0].size > TOGETHER:
            self._label(self._waiting.pop(image.shape))
        if sum(len(images) * math.prod(shape[:2]) for shape, images in self._waiting.items()) > WAITING:
            self.finish()

    def finish(self) -> None:
        """Label those that wait."""
        while self._waiting:
            self._label(self._waiting.popitem()[1])

    def _label(self, together: list[Read]) -> None:
        images = [image for _, image in together]
        found: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32] | None]]
        try:
            if together[0][0].confidence:
                found = [self._predictor.predict_with_confidence(image) for image in images]
            else:
                found = [(labels, None) for labels in self._predictor.predict_many(images)]
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            for job, _ in together:
                reason = f"{job.image} does not fit the memory of {self._predictor.device}"
                self._failed(job, f"{reason}; give --window, shrink it, or take another --device")
            return
        for (job, image), (labels, confidence) in zip(together, found, strict=True):
            self._write(job, image, labels, confidence)

    def _write(
        self, job: Job, image: NDArray[np.uint8], labels: NDArray[np.uint8], confidence: NDArray[np.float32] | None
    ) -> None:
        """The outputs of one image; its line is last, so that who finds it has all."""
        predictor = self._predictor
        job.labels.parent.mkdir(parents=True, exist_ok=True)
        _write_gray(job.labels, labels)
        if job.confidence and confidence is not None:
            _write_gray(job.confidence, np.rint(255 * confidence).astype(np.uint8))
        write_png(job.overlay, picture_with_legend(image, labels, predictor.classes, self._colours))
        figures = {
            "image": str(job.image),
            "width": image.shape[1],
            "height": image.shape[0],
            "model": predictor.info.path.name,
            "outputs": [str(path) for path in job.outputs],
            "classes": classes_found(labels, predictor.classes),
        }
        self.outcome.figures.append(figures)
        self._append(figures)

    def _failed(self, job: Job, reason: str) -> None:
        self.outcome.failures[str(job.image)] = reason
        self._append({"image": str(job.image), "error": reason})

    def _append(self, figures: Record) -> None:
        # In one call to the system: whoever is killed has written a line or none of it.
        line = (json.dumps(figures) + "\n").encode()
        with naming(Path(self._record.name)):
            begin = self._record.tell()
            if self._record.write(line) < len(line):  # the disk has no room for the rest
                self._record.truncate(begin)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@unwound_by_sigterm()
def main(argv: list[str]) -> None:
    """Label the images as the arguments say, and print which classes were found."""
    options = parse_anywhere(build_parser(), argv)
    keep_freed_memory()
    model = Path(options.model)  # which may be a folder's one
    kept = (model, *model.glob("*.safetensors"))
    outputs = Outputs(options.output, options.overwrite, options.confidence, options.json, kept)
    jobs, others = plan(options.inputs, outputs)
    views = views_of(options)
    predictor = Predictor.from_file(options.model, options.device, options.precision, views, options.sha256)
    options.output.mkdir(parents=True, exist_ok=True)
    outputs.record.unlink(missing_ok=True)  # it may have another name elsewhere, whose file stays as it is
    with outputs.record.open("xb", buffering=0) as record, count_progress() as progress:
        labelling = Labelling(predictor, record)
        for job in progress.track(jobs, description="labelling"):
            labelling.add(job)
        labelling.finish()
    outcome = labelling.outcome
    _print_summary(outcome, predictor, options.output)
    if others:
        names = named([str(path) for path in others])
        console.print(f"passed over {counted(len(others), 'file')}, by name no images: {names}")
    if options.json:
        summary = {
            "model": predictor.info.path.name,
            "source": predictor.info.source,
            "device": str(predictor.device),
            "precision": predictor.precision,
            "images": outcome.figures,
            "failures": outcome.failures,
        }
        write_text(options.json, json.dumps(summary, indent=1) + "\n")
    if outcome.failures:
        reasons = "; ".join(outcome.failures.values())
        raise UserError(f"{len(outcome.failures)} of {len(jobs)} images were not labelled: {reasons}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Label images with a model file. Writes for each image NAME.png (labels, 8-bit gray) and "
        f"NAME_overlay.png (for people), and one {RECORD_NAME} with a line an image: classes and pixels, or why not.",
    )
    add = parser.add_argument
    add(
        "model",
        help="model file, as launch/convert.py wrote it, a folder with one, or its address with #sha256=...",
    )
    add("inputs", nargs="+", metavar="IMAGE_FOLDER_OR_PATTERN", help="patterns in quotes, such as 'photos/**/*.jpg'")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--precision", choices=PRECISIONS, default=AUTO, help="default: bfloat16 where the device multiplies it")
    add("--sha256", metavar="HASH", help="that the model file must have; an address needs it")
    add("--confidence", action="store_true", help="also NAME_confidence.png: each label's probability, 255 for 1")
    add("--overwrite", action="store_true", help="replace outputs that are there already")
    add("--json", type=Path, metavar="PATH", help="also write the figures of all images to one file")
    add_views(parser)
    return parser


def _write_gray(path: Path, values: NDArray[np.uint8]) -> None:
    with replacing(path) as partial:
        Image.fromarray(values).save(partial, format="PNG")


def _print_summary(outcome: Outcome, predictor: Predictor, output_dir: Path) -> None:
    pixels: dict[str, int] = {}
    images: dict[str, int] = {}
    for figures in outcome.figures:
        for found in figures["classes"]:
            pixels[found["name"]] = pixels.get(found["name"], 0) + found["pixels"]
            images[found["name"]] = images.get(found["name"], 0) + 1
    table = Table("class", "share", "images")
    table.columns[1].justify = table.columns[2].justify = "right"
    order = sorted(pixels, key=lambda name: -pixels[name])
    for name in order[:SHOWN_CLASSES]:
        table.add_row(short_name(name), f"{100 * pixels[name] / sum(pixels.values()):.1f} %", str(images[name]))
    if order:
        console.print(table)
    if order[SHOWN_CLASSES:]:
        console.print(f"and {named([short_name(name) for name in order[SHOWN_CLASSES:]])}")
    images_done = counted(len(outcome.figures), "image")
    console.print(f"{images_done} labelled on {predictor.device} in {predictor.precision}, in {output_dir}")
