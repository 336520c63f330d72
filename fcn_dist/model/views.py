"""Several looks at one image: other sizes, mirrored, in windows; labels from the mean of their probabilities.

A look's windows are averaged as scores where they overlap; looks are averaged as probabilities. Scores are interpolated
from the coarse maps to strips of the image's own pixels in one step, so neither those of a look nor of all looks are
ever held at full size.

Shapes: H x W pixels of the image, C outputs, R rows of a strip, h x w coarse cells of a window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.errors import UserError

STRIP_ELEMENTS = 1 << 22  # scores held at once


@dataclass(frozen=True)
class Views:
    """How an image is looked at; by default once, as it is."""

    scales: tuple[float, ...] = (1.0,)  # of the image's sides
    flip: bool = False  # each also mirrored left to right
    window: int = 0  # pixels of the sides of windows; 0: the whole image at once
    overlap: float = 1 / 3  # of neighbouring windows, at least

    def __post_init__(self) -> None:
        if not self.scales or not all(0.05 <= scale <= 20 for scale in self.scales):
            raise UserError(f"scales are {self.scales}; one or more factors from 0.05 to 20 are needed")
        if self.window < 0 or 0 < self.window < 32:
            raise UserError(f"the window is {self.window} pixels; 32 or more are needed, or 0 for whole images")
        if not 0 <= self.overlap < 1:
            raise UserError(f"windows overlap by {self.overlap}; a share from 0 to below 1 is needed")

    @property
    def plain(self) -> bool:
        """Whether it is one look at the image as it is."""
        return self == Views(overlap=self.overlap)


@dataclass(frozen=True)
class Axis:
    """Along one side of the image: where the cells of a window lie."""

    length: int  # of the image, in pixels
    scaled: int  # of the look
    mirrored: bool
    start: int  # of the window, in pixels of the look
    stop: int

    def inside(self, first: int, last: int) -> slice:
        """Which of the image's pixels `first` to `last` have their centres in the window; a slice from `first` on."""
        centres = self._centres(first, last)
        found = ((centres >= self.start) & (centres < self.stop)).nonzero().flatten().tolist()
        return slice(found[0], found[-1] + 1) if found else slice(0, 0)

    def weights(self, first: int, last: int, cells: int, stride: int, offset: int) -> Tensor:
        """Of each cell, for the image's pixels `first` to `last`: (last - first, cells), two of a row not zero."""
        places = ((self._centres(first, last) - self.start + offset) / stride - 0.5).clamp_(0, cells - 1)
        below = places.floor().long().clamp_(max=max(0, cells - 2))
        share = (places - below).float()
        weights = torch.zeros(last - first, cells)
        rows = torch.arange(last - first)
        weights[rows, below] = 1 - share
        if cells > 1:
            weights[rows, below + 1] = share
        return weights

    def _centres(self, first: int, last: int) -> Tensor:
        """Of pixels, in pixels of the look from its first edge on."""
        centres = (torch.arange(first, last, dtype=torch.float64) + 0.5) * self.scaled / self.length
        return self.scaled - centres if self.mirrored else centres


@dataclass(frozen=True)
class Window:
    """What the network says of a part of a look."""

    coarse_Chw: Tensor
    rows: Axis
    columns: Axis


def label_views(
    forward: Callable[[Tensor], Tensor], image_1HW3: Tensor, views: Views, stride: int, offset: int
) -> tuple[Tensor, Tensor]:
    """The most probable output at each pixel (H, W) uint8, and its probability (H, W) float32.

    `forward` gives coarse scores (1, C, h, w) of images (1, H', W', 3) in 0-255, on any device; `stride` and `offset`
    are those of its network.
    """
    looks = [list(windows) for windows in _looks(forward, image_1HW3, views)]
    height, width = image_1HW3.shape[1:3]
    outputs = looks[0][0].coarse_Chw.shape[0]
    labels, confidence = torch.empty(height, width, dtype=torch.uint8), torch.empty(height, width)
    rows = max(1, STRIP_ELEMENTS // (outputs * width))
    for first in range(0, height, rows):
        last = min(first + rows, height)
        mean = sum(_probabilities(windows, first, last, width, stride, offset) for windows in looks) / len(looks)
        assert isinstance(mean, Tensor)
        highest, winners = mean.max(dim=0)
        labels[first:last], confidence[first:last] = winners.to(torch.uint8).cpu(), highest.cpu()
    return labels, confidence


def _looks(forward: Callable[[Tensor], Tensor], image_1HW3: Tensor, views: Views) -> Iterator[Iterator[Window]]:
    for scale in views.scales:
        image = _resized(image_1HW3, scale)
        for mirrored in (False, True) if views.flip else (False,):
            yield _windows(forward, image.flip(2) if mirrored else image, image_1HW3, views, mirrored)


def _windows(
    forward: Callable[[Tensor], Tensor], look: Tensor, image: Tensor, views: Views, mirrored: bool
) -> Iterator[Window]:
    for top, bottom in parts(look.shape[1], views.window, views.overlap):
        for left, right in parts(look.shape[2], views.window, views.overlap):
            coarse = forward(look[:, top:bottom, left:right])[0].float()
            rows = Axis(image.shape[1], look.shape[1], False, top, bottom)
            yield Window(coarse, rows, Axis(image.shape[2], look.shape[2], mirrored, left, right))


def parts(length: int, window: int, overlap: float) -> list[tuple[int, int]]:
    """Starts and stops of as few windows as cover `length` and overlap enough, evenly spread."""
    if not window or length <= window:
        return [(0, length)]
    count = ceil((length - window) / max(1, int(window * (1 - overlap)))) + 1
    starts = [round(number * (length - window) / (count - 1)) for number in range(count)]
    return [(start, start + window) for start in starts]


def _resized(image_1HW3: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return image_1HW3
    size = [max(1, round(length * scale)) for length in image_1HW3.shape[1:3]]
    pixels = image_1HW3.permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return resized.clamp_(0, 255).permute(0, 2, 3, 1)


def _probabilities(windows: list[Window], first: int, last: int, width: int, stride: int, offset: int) -> Tensor:
    """Of one look, for a strip of rows: (C, R, W)."""
    device, outputs = windows[0].coarse_Chw.device, windows[0].coarse_Chw.shape[0]
    sums = torch.zeros(outputs, last - first, width, device=device)
    counts = torch.zeros(last - first, width, device=device)
    for window in windows:
        rows, columns = window.rows.inside(first, last), window.columns.inside(0, width)
        if rows.start == rows.stop or columns.start == columns.stop:
            continue
        height, across = window.coarse_Chw.shape[1:]
        down = window.rows.weights(first + rows.start, first + rows.stop, height, stride, offset).to(device)
        along = window.columns.weights(columns.start, columns.stop, across, stride, offset).to(device)
        sums[:, rows, columns] += down @ window.coarse_Chw @ along.T
        counts[rows, columns] += 1
    return (sums / counts).softmax(dim=0)
