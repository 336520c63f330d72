"""A confusion matrix as a picture: counts and class names in, RGB uint8 (H, W, 3) out.

Shapes: N classes, n shown on either axis.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fcn_dist.deploy.lettering import BACKGROUND, FAINT_TEXT, TEXT, font, widest
from fcn_dist.deploy.pictures import Picture, short_name

GRID = 1200  # pixels that the cells share, within the limits of one
SMALLEST_CELL, LARGEST_CELL = 14, 64  # pixels
NUMBERED_CELL = 40  # from this size on a cell has its share written in it
LARGEST_TEXT = 18  # of names
MARGIN, GAP = 12, 6  # pixels
HATCH = ((38, 41, 47), (92, 98, 108))  # of rows without a share: ground and strokes
TITLE = "per cent of the pixels of each true class (rows) that are labelled as each class (columns)"
ABSENT = "not in the truth"
SHORTEST_SCALE = 340  # pixels
TICKS = (0, 1, 5, 10, 20, 40, 60, 80, 100)  # per cent


def draw_confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Picture:
    """Rows truth, columns prediction, in the order of labels; each row is shares of its own pixels.

    `counts` is (N + 1, N + 1), raw labels, as in scoring/metrics.py. "Other" is shown if anything is predicted to be
    it, as in networks that score it. Rows of classes that are absent from the truth have no shares and are hatched.
    """
    first = 0 if counts[:, 0].any() else 1
    names = ["other", *(short_name(name) for name in classes)][first:]
    shares = row_shares(counts[first:, first:])
    cell = int(np.clip(GRID // len(names), SMALLEST_CELL, LARGEST_CELL))
    absent = np.isnan(shares[:, 0])
    rows = _names(names, absent, cell, at_right=True)
    columns = np.rot90(_names(names, absent, cell, at_right=False))
    grid = _grid(shares, cell)
    text_size = max(LARGEST_TEXT, len(grid) // 70)  # of what is read in the picture as a whole
    scale = _scale(max(len(grid), SHORTEST_SCALE), text_size)
    left, top = MARGIN + rows.shape[1] + GAP, MARGIN + 2 * text_size + len(columns) + GAP
    right = left + grid.shape[1] + text_size
    width = max(right + scale.shape[1], MARGIN + widest([TITLE], text_size)) + MARGIN
    canvas = Image.new("RGB", (width, top + max(len(grid), len(scale)) + MARGIN), BACKGROUND)
    ImageDraw.Draw(canvas).text((MARGIN, MARGIN), TITLE, TEXT, font(text_size))
    canvas.paste(Image.fromarray(columns), (left, top - GAP - len(columns)))
    canvas.paste(Image.fromarray(rows), (MARGIN, top))
    canvas.paste(Image.fromarray(grid), (left, top))
    canvas.paste(Image.fromarray(scale), (right, top))
    return np.asarray(canvas)


def row_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row divided by its sum; NaN where that is 0."""
    totals = counts.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    return shares


def colours_of(shares: NDArray[np.float64]) -> Picture:
    """The colours of shares in [0, 1], (..., 3)."""
    # By its square root: most errors are a few per cent, and could not be told from none.
    steps = np.rint(255 * np.sqrt(shares)).astype(np.uint8)
    bgr = cv2.applyColorMap(steps.reshape(-1, 1), cv2.COLORMAP_VIRIDIS)
    return np.asarray(bgr[:, 0, ::-1].reshape(*shares.shape, 3), np.uint8)


def _grid(shares: NDArray[np.float64], cell: int) -> Picture:
    """The cells, parted by lines of one pixel."""
    side = len(shares) * cell
    picture = colours_of(np.nan_to_num(shares)).repeat(cell, 0).repeat(cell, 1)
    absent = np.isnan(shares).repeat(cell, 0).repeat(cell, 1)
    picture[absent] = _hatched(side, side)[absent]
    picture[cell - 1 :: cell] = picture[:, cell - 1 :: cell] = BACKGROUND
    if cell < NUMBERED_CELL:
        return picture
    canvas = Image.fromarray(picture)
    draw, writing = ImageDraw.Draw(canvas), font(cell * 2 // 7)
    for row, column in np.argwhere(~np.isnan(shares)):
        dark = shares[row, column] < 0.4
        centre = (column * cell + cell / 2, row * cell + cell / 2)
        draw.text(centre, _per_cent(shares[row, column]), TEXT if dark else BACKGROUND, writing, anchor="mm")
    return np.asarray(canvas)


def _per_cent(share: float) -> str:
    return "0" if share == 0 else "100" if share == 1 else "<0.1" if share < 0.0005 else f"{100 * share:.1f}"


def _names(names: Sequence[str], absent: NDArray[np.bool_], cell: int, *, at_right: bool) -> Picture:
    """A line a class, as high as a cell; fainter if it is absent."""
    size = _text_size(cell)
    width = widest(names, size) + 2
    canvas = Image.new("RGB", (width, len(names) * cell), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, name in enumerate(names):
        x, anchor = (width - 1, "rm") if at_right else (1, "lm")
        colour = FAINT_TEXT if absent[number] else TEXT
        draw.text((x, number * cell + cell / 2), name, colour, font(size), anchor=anchor)
    return np.asarray(canvas)


def _text_size(cell: int) -> int:
    return min(LARGEST_TEXT, cell - 2)


def _scale(height: int, text_size: int) -> Picture:
    """The colours of shares from 0 at the bottom to all, and what hatching means."""
    swatch = text_size + GAP
    bar, beside = height - 2 * swatch, swatch + GAP
    canvas = np.full((height, beside + widest([ABSENT], text_size) + 2, 3), BACKGROUND, np.uint8)
    canvas[:bar, :swatch] = colours_of(np.linspace(1, 0, bar) ** 2)[:, None]  # even in colour
    canvas[-swatch:, :swatch] = _hatched(swatch, swatch)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for tick in TICKS:
        y = float(np.clip((1 - np.sqrt(tick / 100)) * (bar - 1), text_size / 2, bar - text_size / 2))
        draw.text((beside, y), f"{tick} %", TEXT, font(text_size), anchor="lm")
    draw.text((beside, height - swatch / 2), ABSENT, TEXT, font(text_size), anchor="lm")
    return np.asarray(picture)


def _hatched(height: int, width: int) -> Picture:
    y, x = np.mgrid[:height, :width]
    picture: Picture = np.array(HATCH, np.uint8)[((x + y) % 7 < 2).astype(int)]
    return picture
