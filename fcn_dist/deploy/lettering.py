"""Text on pictures: captions and legends, as RGB uint8 arrays on the common background."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (24, 26, 30)
TEXT = (232, 234, 237)
FAINT_TEXT = (154, 160, 168)


class Entry(NamedTuple):
    """One line of a legend."""

    name: str
    colour: tuple[int, int, int] | None  # None: a hollow swatch
    numbers: tuple[str, ...]  # one for each heading, or a single one


def draw_caption(text: str, width: int, text_size: int, *, bold: bool = False) -> NDArray[np.uint8]:
    """A line of text, cut off at `width`."""
    canvas = Image.new("RGB", (width, round(text_size * 1.4)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    # Pillow's own font has one weight; a thin stroke makes it heavier.
    stroke = 0.4 if bold else 0
    draw.text((1, 0), text, TEXT if bold else FAINT_TEXT, font(text_size), stroke_width=stroke)
    return np.asarray(canvas)


def draw_legend(
    entries: Sequence[Entry],
    text_size: int,
    headings: Sequence[str] = (),
    *,
    max_height: int | None = None,
    max_width: int | None = None,
) -> NDArray[np.uint8]:
    """A legend in as many columns as a greatest height, or a greatest width, asks for; at least one."""
    line, gap = round(text_size * 1.55), round(text_size * 0.55)
    name_width = widest([entry.name for entry in entries], text_size)
    number_widths = [
        widest([*numbers, *headings[i : i + 1]], text_size) + 2 * gap
        for i, numbers in enumerate(zip(*(entry.numbers for entry in entries), strict=True))
    ]
    column = text_size + gap + name_width + sum(number_widths)
    head = line if headings else 0
    if max_width is not None:
        columns = max(1, (max_width + 3 * gap) // (column + 3 * gap))
    else:
        fitting = max(1, (max_height - head) // line) if max_height else len(entries)
        columns = -(-len(entries) // fitting)
    rows = -(-len(entries) // columns)
    columns = -(-len(entries) // rows)
    size = (columns * (column + 3 * gap) - 3 * gap, head + rows * line)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, entry in enumerate(entries):
        left, top = number // rows * (column + 3 * gap), head + number % rows * line
        if headings and number % rows == 0:
            _draw_numbers(draw, headings, number_widths, (left + column, 0), text_size)
        _draw_swatch(draw, entry, (left, top + (line - text_size) // 2), text_size)
        draw.text((left + text_size + gap, top + line / 2), entry.name, TEXT, font(text_size), anchor="lm")
        _draw_numbers(draw, entry.numbers, number_widths, (left + column, top), text_size)
    return np.asarray(canvas)


def _draw_swatch(draw: ImageDraw.ImageDraw, entry: Entry, corner: tuple[int, int], side: int) -> None:
    left, top = corner
    box = (left, top, left + side - 1, top + side - 1)
    draw.rounded_rectangle(box, side // 5, fill=entry.colour, outline=(entry.colour and (90, 95, 102)) or FAINT_TEXT)


def _draw_numbers(
    draw: ImageDraw.ImageDraw,
    numbers: Sequence[str],
    widths: Sequence[int],
    corner: tuple[int, int],
    text_size: int,
) -> None:
    """Right-aligned columns that end at the corner's x."""
    right, top = corner
    for number, width in zip(reversed(numbers), reversed(widths), strict=True):
        draw.text((right, top + text_size * 0.775), number, FAINT_TEXT, font(text_size), anchor="rm")
        right -= width


def widest(texts: Sequence[str], text_size: int) -> int:
    return max(round(font(text_size).getlength(text)) for text in texts)


@lru_cache(maxsize=8)
def font(text_size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(text_size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
