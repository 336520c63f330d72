"""Pictures that people look at: an image and its labels in, an RGB picture with outlines, legend and text out.

Images and pictures are RGB uint8 (H, W, 3); labels are uint8 (H, W), 0 = other, 1..N = the classes, whose names
and RGB colours come as sequences of N. Wrong shapes and labels above N raise UserError.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fcn_dist.deploy.colours import Colour
from fcn_dist.deploy.lettering import BACKGROUND, Entry, draw_caption, draw_legend
from fcn_dist.deploy.naming import draw_names
from fcn_dist.errors import UserError
from fcn_dist.files import replacing

Picture = NDArray[np.uint8]
Labels = NDArray[np.uint8]

OUTLINE_LIGHT = 0.45  # an outline is the overlay darkened to this share
SMALLEST_WIDTH = 480  # narrower images are enlarged
TILE = 480  # a sheet's scenes fit into squares of this side
SCREEN_ASPECT = 1.6
LONGEST_NAME = 28


class Row(NamedTuple):
    """One scene of a sheet."""

    image: Picture
    truth: Labels
    prediction: Labels | None = None
    title: str = ""


def overlay(image: Picture, labels: Labels, colours: Sequence[Colour], opacity: float = 0.6) -> Picture:
    """The image with each labelled pixel mixed to (1 - opacity) image + opacity colour, rounded.

    Pixels of label 0 stay as they are. Regions are parted by outlines one pixel wide, on labelled pixels only,
    where the mix is darkened to OUTLINE_LIGHT.
    """
    _check(image, labels, len(colours))
    table = np.array([(0, 0, 0), *colours], np.float32)
    mixed = (1 - opacity) * image.astype(np.float32) + opacity * table[labels]
    mixed[_outlines(labels)] *= OUTLINE_LIGHT
    return np.where((labels > 0)[..., None], np.round(mixed), image).clip(0, 255).astype(np.uint8)


def _outlines(labels: Labels) -> NDArray[np.bool_]:
    """Labelled pixels that differ from the pixel before (or, where that is all that is labelled, after) them."""
    outlines = np.zeros(labels.shape, bool)
    for before, after in (((slice(None), slice(-1)), (slice(None), slice(1, None))), (slice(-1), slice(1, None))):
        differ = labels[before] != labels[after]
        outlines[after] |= differ & (labels[after] > 0)
        outlines[before] |= differ & (labels[after] == 0)
    return outlines


def short_name(name: str) -> str:
    """The first synonym of a class: `person, individual, someone` -> `person`."""
    first = re.split("[,;]", name)[0].strip() or name.strip()
    return first if len(first) <= LONGEST_NAME else first[: LONGEST_NAME - 3].rstrip() + "..."


def legend(labels: Labels, classes: Sequence[str], colours: Sequence[Colour], text_size: int = 18) -> Picture:
    """Swatch, name and per cent of each class found, the largest first; "other" last."""
    _check_labels(labels, len(colours))
    return draw_legend(_entries([[labels]], classes, colours), text_size)


def picture_with_legend(image: Picture, labels: Labels, classes: Sequence[str], colours: Sequence[Colour]) -> Picture:
    """The overlay, names on its regions, with its legend beside it, or below where it is flat or has many classes."""
    _check(image, labels, len(colours))
    # An integer factor keeps the pixels of a tiny image equally large.
    height, width = labels.shape
    factor = max(1, min(-(-SMALLEST_WIDTH // width), 4 * SMALLEST_WIDTH // height))
    image, labels = _resize(image, labels, (width * factor, height * factor))
    text_size = int(np.clip(max(labels.shape) / 38, 15, 44))
    named = draw_names(overlay(image, labels, colours), labels, [short_name(name) for name in classes], text_size)
    return _with_legend(named, _entries([[labels]], classes, colours), text_size)


def triple(
    image: Picture, truth: Labels, prediction: Labels, classes: Sequence[str], colours: Sequence[Colour]
) -> Picture:
    """Image, truth and prediction side by side with one legend and the prediction's pixel accuracy."""
    return sheet([Row(image, truth, prediction)], classes, colours)


def sheet(rows: Sequence[Row], classes: Sequence[str], colours: Sequence[Colour]) -> Picture:
    """Several scenes, one a row: image, truth and, where there is one, prediction, with one legend.

    Under a prediction stands its accuracy over the pixels that are labelled in the truth. The legend's per cents
    are of all pixels of all rows.
    """
    if not rows:
        raise UserError("a sheet of 0 scenes was asked for; at least 1 is needed; name some scenes")
    predictions = [row.prediction for row in rows if row.prediction is not None]
    titles = ("image", "truth", "prediction")[: 3 if predictions else 2]
    head = [draw_caption(title, TILE, 20, bold=True) for title in titles]
    body = _stack([_beside(head), *(_row(row, len(titles), colours) for row in rows)])
    groups = [[row.truth for row in rows], *([predictions] if predictions else [])]
    return _with_legend(body, _entries(groups, classes, colours), 18, titles[1:] if predictions else ())


def with_legend(body: Picture, maps: Sequence[Labels], classes: Sequence[str], colours: Sequence[Colour]) -> Picture:
    """A picture that shows these label maps, with the legend of them; its per cents are of all their pixels."""
    return _with_legend(body, _entries([maps], classes, colours), 18)


def accuracy(truth: Labels, prediction: Labels) -> float | None:
    """The share of the pixels labelled in the truth that the prediction has right; None if none is labelled."""
    labelled = truth > 0
    return float((prediction == truth)[labelled].mean()) if labelled.any() else None


def write_png(path: Path, picture: Picture) -> None:
    """Write a PNG that is whole or not there."""
    encoded, payload = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert encoded, path
    with replacing(path) as partial:
        partial.write_bytes(payload.tobytes())


def _entries(groups: Sequence[Sequence[Labels]], classes: Sequence[str], colours: Sequence[Colour]) -> list[Entry]:
    """Legend lines, with one per cent for each group of label maps."""
    shares = []
    for maps in groups:
        counts = sum(np.bincount(labels.ravel(), minlength=len(classes) + 1) for labels in maps)
        shares.append(np.asarray(counts) / sum(labels.size for labels in maps))
    order = sorted(range(1, len(classes) + 1), key=lambda label: tuple(-share[label] for share in shares))
    entries = [
        Entry(short_name(classes[label - 1]), colours[label - 1], tuple(_per_cent(s[label]) for s in shares))
        for label in order
        if any(share[label] for share in shares)
    ]
    if any(share[0] for share in shares):
        entries.append(Entry("other", None, tuple(_per_cent(share[0]) for share in shares)))
    return entries


def _per_cent(share: float) -> str:
    return "-" if share == 0 else "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def _row(row: Row, columns: int, colours: Sequence[Colour]) -> Picture:
    """One scene's tiles with their captions."""
    height, width = row.truth.shape
    scale = min(TILE / width, TILE / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    tiles = [(_resize(row.image, row.truth, size)[0], row.title)]
    for labels in (row.truth, row.prediction):
        if labels is None:
            continue
        _check(row.image, labels, len(colours))
        right = accuracy(row.truth, labels)
        caption = "nothing is labelled" if right is None else f"pixel accuracy {100 * right:.1f} %"
        picture = overlay(*_resize(row.image, labels, size), colours)
        tiles.append((picture, "" if labels is row.truth else caption))
    blank = np.full((1, TILE, 3), BACKGROUND, np.uint8)
    cells = [_stack([_centred(tile), draw_caption(caption, TILE, 16)], gap=4) for tile, caption in tiles]
    return _beside(cells + [blank] * (columns - len(cells)))


def _resize(image: Picture, labels: Labels, size: tuple[int, int]) -> tuple[Picture, Labels]:
    shrinks = size[0] < labels.shape[1]
    return (
        cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC),
        cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT),
    )


def _with_legend(body: Picture, entries: Sequence[Entry], text_size: int, headings: Sequence[str] = ()) -> Picture:
    """The body with its legend beside or below it, whichever comes nearer to the shape of a screen."""
    height, width = body.shape[:2]
    beside = _beside([body, draw_legend(entries, text_size, headings, max_height=height)], gap=text_size)
    below = _stack([body, draw_legend(entries, text_size, headings, max_width=width)], gap=text_size)
    margin = text_size
    best = min(beside, below, key=lambda picture: abs(np.log(picture.shape[1] / picture.shape[0] / SCREEN_ASPECT)))
    return _bordered(best, margin, margin, margin)


def _centred(tile: Picture) -> Picture:
    left = (TILE - tile.shape[1]) // 2
    return _bordered(tile, 0, left, TILE - tile.shape[1] - left)


def _bordered(picture: Picture, vertical: int, left: int, right: int) -> Picture:
    bordered: Picture = cv2.copyMakeBorder(
        picture, vertical, vertical, left, right, cv2.BORDER_CONSTANT, value=BACKGROUND
    )
    return bordered


def _beside(pictures: Sequence[Picture], gap: int = 12) -> Picture:
    """Pictures in a row, aligned at the top."""
    return _stack([picture.transpose(1, 0, 2) for picture in pictures], gap).transpose(1, 0, 2)


def _stack(pictures: Sequence[Picture], gap: int = 12) -> Picture:
    """Pictures in a column, aligned on the left."""
    height = sum(len(picture) for picture in pictures) + gap * (len(pictures) - 1)
    stacked = np.full((height, max(picture.shape[1] for picture in pictures), 3), BACKGROUND, np.uint8)
    top = 0
    for picture in pictures:
        stacked[top : top + len(picture), : picture.shape[1]] = picture
        top += len(picture) + gap
    return stacked


def _check(image: Picture, labels: Labels, num_classes: int) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(
            f"an image of shape {image.shape} and type {image.dtype} cannot be shown; RGB uint8 (H, W, 3) is "
            "needed; convert it"
        )
    if labels.shape != image.shape[:2]:
        raise UserError(
            f"labels of shape {labels.shape} do not fit an image of {image.shape[:2]}; the same height and width "
            "are needed; resize one of them"
        )
    _check_labels(labels, num_classes)


def _check_labels(labels: Labels, num_classes: int) -> None:
    if labels.ndim != 2 or labels.size == 0 or labels.dtype != np.uint8:
        raise UserError(
            f"labels of shape {labels.shape} and type {labels.dtype} cannot be shown; uint8 (H, W) is needed; "
            "convert them"
        )
    if labels.max() > num_classes:
        raise UserError(
            f"label {labels.max()} has no colour: there are {num_classes}; labels 0..{num_classes} are needed; "
            "give the classes and colours of the model that made the labels"
        )
