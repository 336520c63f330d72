"""Names written on the regions of a picture: a picture and its labels in, the picture with names out.

A name stands where its region is widest, in the largest size that fits there. Regions that no readable name fits, and
those where it would touch another's, go without: the legend has them all.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fcn_dist.deploy.lettering import font

SMALLEST_SHARE = 0.002  # of the picture's pixels, that a region must have
SMALLEST_TEXT = 11  # pixels
MOST_NAMES = 40
# Of the width of the widest place, and of the region's box: a name may reach over the border of a region by a little.
REACH = 1.25
LIGHT, DARK = (255, 255, 255), (16, 18, 22)

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Region(NamedTuple):
    """Pixels of one label that touch each other."""

    label: int
    size: int  # pixels
    centre: tuple[int, int]  # x, y of the pixel that is farthest from any border
    radius: float  # its distance from it
    width: int  # of the region's row of pixels through the centre


def draw_names(
    picture: NDArray[np.uint8], labels: NDArray[np.uint8], names: Sequence[str], largest_text: int
) -> NDArray[np.uint8]:
    """`picture` with the names of labels 1..N on their regions, the largest regions first."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    taken: list[Box] = []
    found = sorted(regions(labels), key=lambda region: -region.size)
    for region in found:
        if len(taken) == MOST_NAMES:
            break
        name = names[region.label - 1]
        size = _fitting(name, region, largest_text)
        if size is None:
            continue
        box = _box(name, region.centre, size, canvas.size)
        if any(_touch(box, other) for other in taken):
            continue
        taken.append(box)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        stroke = max(2, size // 7)
        draw.text(middle, name, LIGHT, font(size), anchor="mm", stroke_width=stroke, stroke_fill=DARK)
    return np.asarray(canvas)


def regions(labels: NDArray[np.uint8]) -> Iterator[Region]:
    """Those that are large enough, of labels above 0."""
    smallest = SMALLEST_SHARE * labels.size
    for label in np.flatnonzero(np.bincount(labels.ravel()) >= smallest):
        if label == 0:
            continue
        count, parts, stats, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=4)
        for number in range(1, count):
            left, top, width, height, size = (int(value) for value in stats[number])
            if size < smallest:
                continue
            inside = (parts[top : top + height, left : left + width] == number).astype(np.uint8)
            # The picture's border is one, too.
            distances = cv2.distanceTransform(np.pad(inside, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
            y, x = (int(value) for value in np.unravel_index(int(distances.argmax()), distances.shape))
            row = np.flatnonzero(inside[y] == 0)
            before, after = row[row < x], row[row > x]
            run = int(after.min() if after.size else width) - int(before.max() + 1 if before.size else 0)
            yield Region(int(label), size, (left + x, top + y), float(distances[y, x]), run)


def _fitting(name: str, region: Region, largest: int) -> int | None:
    """The largest size of text that fits the region, if one that can be read does."""
    for size in range(min(largest, int(2 * region.radius)), SMALLEST_TEXT - 1, -1):
        if font(size).getlength(name) <= REACH * region.width:
            return size
    return None


def _box(name: str, centre: tuple[int, int], size: int, picture: tuple[int, int]) -> Box:
    """Where the text goes: around the centre, moved into the picture."""
    stroke = max(2, size // 7)
    half_width, half_height = font(size).getlength(name) / 2 + stroke, size * 0.6 + stroke
    x = min(max(centre[0], half_width), max(half_width, picture[0] - half_width))
    y = min(max(centre[1], half_height), max(half_height, picture[1] - half_height))
    return x - half_width, y - half_height, x + half_width, y + half_height


def _touch(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
