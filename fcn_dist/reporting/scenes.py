"""Validation scenes of the last evaluation: image, truth, prediction and where they differ."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcn_dist.deploy.colours import Colour, distinct
from fcn_dist.deploy.pictures import overlay
from fcn_dist.errors import UserError, counted
from fcn_dist.reporting.classes import per_cent, shown_names
from fcn_dist.reporting.markup import Html, element, join, note
from fcn_dist.reporting.rundata import EVALUATION, RunData

Picture = NDArray[np.uint8]
LONGEST_SIDE = 360  # pixels of a picture on the page
QUALITY = 82  # of its JPEG
WRONG, UNLABELLED = (230, 40, 60), (90, 90, 90)
GROUPS = {"best": "Best", "median": "In the middle", "worst": "Worst"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of Pillow
KINDS = ("image", "truth", "prediction", "errors")


def gallery(run: RunData, evaluation: dict[str, Any]) -> Html:
    """The scenes by groups, with one legend; or why there are none."""
    folder = run.folder / Path(EVALUATION).parent
    colours = distinct([(int(r), int(g), int(b)) for r, g, b in run.record.model["colours"]])
    seen: set[int] = set()
    groups: dict[str, list[Html]] = {}
    lost = 0
    for scene in evaluation["scenes"]:
        try:
            images = _read(folder, scene)
            pictures = _pictures(images, colours)
        except UserError:
            lost += 1
            continue
        seen |= set(np.unique(images[1]).tolist()) | set(np.unique(images[2]).tolist())
        groups.setdefault(scene["name"].partition("-")[0], []).append(_shown(scene, pictures))
    parts: list[str | None] = []
    if groups:
        parts.append(_legend(sorted(seen - {0}), run.classes, colours))
    for group, scenes in groups.items():
        parts += [element("h3", GROUPS.get(group, group)), *scenes]
    if lost:
        parts.append(note(f"{counted(lost, 'scene')} could not be read from {folder}."))
    if not evaluation["scenes"]:
        setting = element("code", "evaluate.scenes=9")
        parts.append(note("No scenes were kept of this evaluation; ", setting, " keeps nine."))
    return join(parts)


def _read(folder: Path, scene: dict[str, Any]) -> tuple[Picture, Picture, Picture]:
    """Image, truth and prediction, shrunk alike."""
    read = []
    for kind, mode in (("image", "RGB"), ("truth", "L"), ("prediction", "L")):
        # Not by OpenCV, which writes of damaged files to standard error, and its libpng does whatever the log level.
        try:
            with Image.open(folder / scene[kind]) as file:
                array = np.array(file.convert(mode))
        except UNREADABLE as error:
            raise UserError(f"{folder / scene[kind]} is no picture ({error}); evaluate again") from error
        height, width = array.shape[:2]
        scale = min(1.0, LONGEST_SIDE / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        smooth = cv2.INTER_AREA if kind == "image" else cv2.INTER_NEAREST_EXACT
        read.append(np.asarray(cv2.resize(array, size, interpolation=smooth), np.uint8))
    image, truth, prediction = read
    return image, truth, prediction


def _pictures(images: tuple[Picture, Picture, Picture], colours: Sequence[Colour]) -> list[Picture]:
    image, truth, prediction = images
    labels = (overlay(image, truth, colours, 0.7), overlay(image, prediction, colours, 0.7))
    return [image, *labels, errors(image, truth, prediction)]


def errors(image: Picture, truth: Picture, prediction: Picture) -> Picture:
    """The image in gray; red where a labelled pixel is wrong, darkened where none is labelled."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    shown = np.repeat((90 + 0.6 * gray)[..., None], 3, axis=2)
    wrong, unlabelled = (truth > 0) & (truth != prediction), truth == 0
    shown[wrong] = 0.25 * shown[wrong] + 0.75 * np.array(WRONG, np.float32)
    shown[unlabelled] = 0.35 * shown[unlabelled]
    return shown.clip(0, 255).astype(np.uint8)


def _shown(scene: dict[str, Any], pictures: Sequence[Picture]) -> Html:
    key, right = str(scene["key"]), per_cent(scene["right"] / scene["labelled"])
    cells = [
        element("figure", _img(picture, f"{kind} of {key}"), element("figcaption", kind))
        for kind, picture in zip(KINDS, pictures, strict=True)
    ]
    title = element("p", element("b", key), f": {right} of its labelled pixels are right")
    return element("article", title, element("div", *cells, class_="four"), class_="scene")


def _img(picture: Picture, description: str) -> Html:
    encoded, payload = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    assert encoded, description
    data = base64.b64encode(payload.tobytes()).decode()
    height, width = picture.shape[:2]
    return element("img", src=f"data:image/jpeg;base64,{data}", alt=description, width=str(width), height=str(height))


def _legend(labels: Sequence[int], classes: Sequence[str], colours: Sequence[Colour]) -> Html:
    """Of the classes, and apart from it that of the errors: a class may have the colour of what is wrong."""
    names = shown_names(classes)
    of_classes = [_entry(colours[label - 1], names[label - 1]) for label in labels]
    of_errors = [_entry((195, 70, 80), "wrong"), _entry((60, 60, 60), "not labelled")]
    return join(
        [
            element("ul", element("li", "Classes, in truth and prediction:"), *of_classes, class_="legend"),
            element("ul", element("li", "In the errors alone, whatever the class:"), *of_errors, class_="legend"),
        ]
    )


def _entry(colour: Colour, name: str) -> Html:
    return element("li", element("span", class_="swatch", style="background:rgb({},{},{})".format(*colour)), name)
