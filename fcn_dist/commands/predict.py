"""`predict`: a model file and images in; label maps, overlays and figures out."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from fcn_dist.commands.views import add_views, views_of
from fcn_dist.console import console
from fcn_dist.deploy.imagefiles import SUFFIXES, Job, plan, read_rgb
from fcn_dist.deploy.pictures import distinct, picture_with_legend, short_name, write_png
from fcn_dist.deploy.predict import AUTO, PRECISIONS, Predictor
from fcn_dist.errors import UserError, named
from fcn_dist.files import replacing, write_text
from fcn_dist.model.devices import keep_freed_memory
from fcn_dist.progress import count_progress

SHOWN_CLASSES = 10


@dataclass
class Outcome:
    """What came of all images."""

    figures: list[dict[str, Any]]  # one an image
    failures: dict[str, str]  # image -> why


def main(argv: list[str]) -> None:
    """Label the images as the arguments say, and print which classes were found."""
    options = _parser().parse_args(argv)
    keep_freed_memory()
    jobs = plan(options.inputs, options.output, options.overwrite, options.confidence)
    predictor = Predictor.from_file(options.model, options.device, options.precision, views_of(options))
    outcome = _label_all(jobs, predictor)
    _print_summary(outcome, predictor, options.output)
    if options.json:
        summary = {
            "model": str(options.model),
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "predict",
        description="Label images with a model file. Writes for each image NAME.png (labels, 8-bit gray), "
        "NAME_overlay.png (for people) and NAME.json (which classes, how many pixels).",
    )
    add = parser.add_argument
    add("model", type=Path, help="model file, as launch/convert.py wrote it")
    add("inputs", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help=f"in folders: {' '.join(SUFFIXES)}")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--precision", choices=PRECISIONS, default=AUTO, help="default: bfloat16 where the device multiplies it")
    add("--confidence", action="store_true", help="also NAME_confidence.png: each label's probability, 255 for 1")
    add("--overwrite", action="store_true", help="replace outputs that are there already")
    add("--json", type=Path, metavar="PATH", help="also write the figures of all images to one file")
    add_views(parser)
    return parser


def _label_all(jobs: list[Job], predictor: Predictor) -> Outcome:
    """Every image is tried; one that cannot be read does not stop the others."""
    outcome = Outcome([], {})
    colours = distinct(predictor.colours)
    with count_progress() as progress:
        for job in progress.track(jobs, description="labelling"):
            try:
                outcome.figures.append(_label(job, predictor, colours))
            except UserError as error:
                outcome.failures[str(job.image)] = str(error)
            except torch.OutOfMemoryError:
                outcome.failures[str(job.image)] = (
                    f"{job.image} does not fit the memory of {predictor.device}; shrink it, or take --device cpu"
                )
    return outcome


def _label(job: Job, predictor: Predictor, colours: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    """Write the outputs of one image; the figures are last, so that who finds them has all."""
    image = read_rgb(job.image)
    if job.confidence:
        labels, confidence = predictor.predict_with_confidence(image)
    else:
        labels = predictor.predict(image)
    figures = {
        "image": str(job.image),
        "width": image.shape[1],
        "height": image.shape[0],
        "model": predictor.info.path.name,
        "labels": job.labels.name,
        "overlay": job.overlay.name,
        "classes": _classes_found(labels, predictor.classes),
    }
    job.labels.parent.mkdir(parents=True, exist_ok=True)
    with replacing(job.labels) as partial:
        Image.fromarray(labels).save(partial, format="PNG")
    if job.confidence:
        with replacing(job.confidence) as partial:
            Image.fromarray(np.rint(255 * confidence).astype(np.uint8)).save(partial, format="PNG")
    write_png(job.overlay, picture_with_legend(image, labels, predictor.classes, colours))
    write_text(job.figures, json.dumps(figures, indent=1) + "\n")
    return figures


def _classes_found(labels: NDArray[np.uint8], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Label, name, pixels and share of each class in the picture, the largest first."""
    counts = np.bincount(labels.ravel(), minlength=len(classes) + 1)
    return [
        {
            "label": int(label),
            "name": classes[label - 1] if label else "other",
            "pixels": int(counts[label]),
            "share": int(counts[label]) / labels.size,
        }
        for label in np.argsort(-counts, kind="stable")
        if counts[label]
    ]


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
    console.print(
        f"{len(outcome.figures)} images labelled on {predictor.device} in {predictor.precision}, in {output_dir}"
    )
