"""Encoded samples in, image and mask arrays out; what is random is keyed by (seed, position).

Images are RGB uint8 (H, W, 3), masks uint8 (H, W).
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fcn_dist.config import DataConfig
from fcn_dist.data.decoders import REDUCED, decode_image, decode_mask
from fcn_dist.data.headers import jpeg_size, png_size
from fcn_dist.data.shard import DamagedSample, Sample
from fcn_dist.keys import Purpose, key64
from fcn_dist.labels import IGNORE_LABEL

Pixels = NDArray[np.uint8]
# The decoder's shrinking and the one that follows are not one: where the second halves at least, crops of real scenes
# are within 3 levels of 255 on average of those decoded whole, and 99 of 100 values within 18
# (tests/test_transforms.py; usual on ADE and CamVid are 1 and 7).
_SHRINKS_AFTER = 2
_DRAWS = 10


def decode(sample: Sample, reduction: int = 1, mask: Pixels | None = None) -> tuple[Pixels, Pixels]:
    """Image, at 1/`reduction` of its size (1, 2 or 4), and mask of a sample; `mask` if it is decoded already.

    The JPEG decoder itself shrinks: it leaves out the frequencies that the smaller image cannot show, and the time they
    take. Raises DamagedSample, naming the key, if either does not decode.
    """
    image, mask = decode_image(sample.image, reduction), decode_mask(sample.mask) if mask is None else mask
    if image is None or mask is None or image.shape[:2] != tuple(-(-n // reduction) for n in mask.shape):
        found = [None if array is None else array.shape for array in (image, mask)]
        raise DamagedSample(sample.key, f"it decodes to image and mask of shapes {found}; two of one size are needed")
    return image, mask


def check_size(sample: Sample, size: tuple[int, int], max_pixels: int) -> None:
    """Raise DamagedSample unless both headers state `size` (height, width), before any memory is given to pixels."""
    if size[0] * size[1] > max_pixels:
        raise DamagedSample(
            sample.key, f"it is recorded with {size[1]}x{size[0]} pixels, more than the {max_pixels} of its set"
        )
    for name, stated in (("image", jpeg_size(sample.image)), ("mask", png_size(sample.mask))):
        if stated != size:
            found = f"{stated[1]}x{stated[0]} pixels" if stated else "no size"
            raise DamagedSample(
                sample.key, f"its {name} states {found} in its header, but {size[1]}x{size[0]} are recorded"
            )


def generator(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """The random numbers of one stream position for one purpose."""
    # An array of its own type: a list that mixes integers below and above 2^63 becomes float64, and loses bits.
    return np.random.Generator(np.random.Philox(key=np.array([key64(seed, purpose), position], np.uint64)))


@dataclass(frozen=True)
class CropWindow:
    """A part of the source, the size it is resized to, and where that lies in the crop."""

    source: tuple[slice, slice]  # of the mask, and of the image as decoded at full size
    size: tuple[int, int]
    offset: tuple[int, int]
    mirrored: bool = False  # left to right, the whole crop
    reduction: int = 1  # at which the image may be decoded; the source window lies on whole pixels of it

    @property
    def reduced_source(self) -> tuple[slice, slice]:
        """The window in the image as decoded at 1/`reduction`."""
        rows, columns = (slice(s.start // self.reduction, -(-s.stop // self.reduction)) for s in self.source)
        return rows, columns


def draw_window(rng: np.random.Generator, height: int, width: int, config: DataConfig) -> CropWindow:
    """Resize by a log-uniform factor, then crop at a uniform place; what is smaller than the crop is placed in it.

    Some are mirrored then. The first two steps are drawn as one: only the part of the source that the crop shows is
    ever resized. Without a range of factors, the crop shows all of the source, whatever its shape.
    """
    if config.scale is None:
        return _squashed(height, width, config, mirrored=bool(rng.random() < config.flip))
    low, high = np.log(config.scale)
    factor = float(np.exp(rng.uniform(low, high)))
    reduction = _reduction(factor, config)
    axes = [
        _draw_axis(rng, length, factor, crop, reduction)
        for length, crop in zip((height, width), config.crop, strict=True)
    ]
    (rows, out_height, top), (columns, out_width, left) = axes
    mirrored = bool(rng.random() < config.flip)
    return CropWindow((rows, columns), (out_height, out_width), (top, left), mirrored, reduction)


def draw_mixed_window(rng: np.random.Generator, targets: Pixels, config: DataConfig) -> CropWindow:
    """As `draw_window`, again and again until no class has more of the labelled pixels than it may; ten times at most.

    What a crop shows is counted in `targets`, the source's, before it is resized.
    """
    window = draw_window(rng, targets.shape[0], targets.shape[1], config)
    for _ in range(_DRAWS - 1):
        counts = np.bincount(targets[window.source].ravel(), minlength=IGNORE_LABEL + 1)[:IGNORE_LABEL]
        if counts.max() <= config.class_limit * counts.sum():
            break
        window = draw_window(rng, targets.shape[0], targets.shape[1], config)
    return window


def _squashed(height: int, width: int, config: DataConfig, mirrored: bool) -> CropWindow:
    reduction = _reduction(max(config.crop[0] / height, config.crop[1] / width), config)
    return CropWindow((slice(0, height), slice(0, width)), config.crop, (0, 0), mirrored, reduction)


def _reduction(factor: float, config: DataConfig) -> int:
    """At which the decoder may shrink an image that is resized by `factor`."""
    if config.interpolation == "nearest":  # picks pixels of the image as it is
        return 1
    return max(r for r in REDUCED if r == 1 or r * factor * _SHRINKS_AFTER <= 1)


def _draw_axis(
    rng: np.random.Generator, length: int, factor: float, crop: int, reduction: int
) -> tuple[slice, int, int]:
    scaled = max(1, round(length * factor))
    shown = min(crop, scaled)
    start = int(rng.integers(0, scaled - shown + 1))
    offset = int(rng.integers(0, crop - shown + 1))
    # Whole pixels of the source as it is decoded, rounded outwards, which moves an edge by less than a pixel of it:
    # image and mask take the same window, so they stay aligned.
    unit = reduction * scaled
    first = start * length // unit * reduction
    last = min(length, -(-(start + shown) * length // unit) * reduction)
    return slice(first, last), shown, offset


def crop_into(
    window: CropWindow,
    image: Pixels,
    mask: Pixels,
    image_out: Pixels,
    mask_out: Pixels,
    interpolation: str = "bilinear",
) -> None:
    """Write the window into arrays of the crop's size, which hold the padding already.

    `image` is decoded at 1/`window.reduction`, `mask` at its full size.
    """
    height, width = window.size
    top, left = window.offset
    part = image[window.reduced_source]
    # From half the size on, bilinear interpolation still reads every pixel, at a quarter of the time of an average.
    averages = 2 * height < part.shape[0] or 2 * width < part.shape[1]
    how = cv2.INTER_AREA if averages else cv2.INTER_LINEAR
    if interpolation == "nearest":
        how = cv2.INTER_NEAREST_EXACT
    cv2.resize(part, (width, height), image_out[top : top + height, left : left + width], interpolation=how)
    # The "exact" form samples at pixel centres, as the image's interpolation does; the plain one is half a pixel off.
    mask_out[top : top + height, left : left + width] = cv2.resize(
        mask[window.source], (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )
    if window.mirrored:
        for out in (image_out, mask_out):
            cv2.flip(out, 1, out)
