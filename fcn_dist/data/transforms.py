"""Encoded samples in, image and mask arrays out; what is random is keyed by (seed, position).

Images are RGB uint8 (H, W, 3), masks uint8 (H, W).
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fcn_dist.config import DataConfig
from fcn_dist.data.shardset import DamagedSample, Sample
from fcn_dist.keys import Purpose, key64

Pixels = NDArray[np.uint8]


def decode(sample: Sample) -> tuple[Pixels, Pixels]:
    """Image and mask of a sample. Raises DamagedSample, naming the key, if either does not decode."""
    # Packing removed EXIF orientation; a tag that is there all the same must not turn the image under its mask.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = _imdecode(sample.image, flags)
    mask = _imdecode(sample.mask, cv2.IMREAD_GRAYSCALE)
    if image is None or mask is None or image.shape[:2] != mask.shape:
        found = [None if array is None else array.shape for array in (image, mask)]
        raise DamagedSample(
            f"sample {sample.key!r} decodes to image and mask of shapes {found}; two of one size are needed; "
            "check the shards with shards/verify.py"
        )
    return image, mask


def generator(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """The random numbers of one stream position for one purpose."""
    # An array of its own type: a list that mixes integers below and above 2^63 becomes float64, and loses bits.
    return np.random.Generator(np.random.Philox(key=np.array([key64(seed, purpose), position], np.uint64)))


@dataclass(frozen=True)
class CropWindow:
    """A part of the source, the size it is resized to, and where that lies in the crop."""

    source: tuple[slice, slice]
    size: tuple[int, int]
    offset: tuple[int, int]


def draw_window(rng: np.random.Generator, height: int, width: int, config: DataConfig) -> CropWindow:
    """Resize by a log-uniform factor, then crop at a uniform place; what is smaller than the crop is placed in it.

    The two steps are drawn as one: only the part of the source that the crop shows is ever resized.
    """
    low, high = np.log(config.scale)
    factor = float(np.exp(rng.uniform(low, high)))
    axes = [_draw_axis(rng, length, factor, crop) for length, crop in zip((height, width), config.crop, strict=True)]
    (rows, out_height, top), (columns, out_width, left) = axes
    return CropWindow((rows, columns), (out_height, out_width), (top, left))


def _draw_axis(rng: np.random.Generator, length: int, factor: float, crop: int) -> tuple[slice, int, int]:
    scaled = max(1, round(length * factor))
    shown = min(crop, scaled)
    start = int(rng.integers(0, scaled - shown + 1))
    offset = int(rng.integers(0, crop - shown + 1))
    # Whole source pixels, rounded outwards: image and mask take the same window, so they stay aligned.
    first = start * length // scaled
    last = -(-(start + shown) * length // scaled)
    return slice(first, last), shown, offset


def crop_into(window: CropWindow, image: Pixels, mask: Pixels, image_out: Pixels, mask_out: Pixels) -> None:
    """Write the window of image and mask into arrays of the crop's size, which hold the padding already."""
    height, width = window.size
    target = (
        slice(window.offset[0], window.offset[0] + height),
        slice(window.offset[1], window.offset[1] + width),
    )
    part = image[window.source]
    shrinks = height < part.shape[0] or width < part.shape[1]
    image_out[target] = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    # The "exact" form samples at pixel centres, as the image's interpolation does; the plain one is half a pixel off.
    mask_out[target] = cv2.resize(mask[window.source], (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _imdecode(payload: bytes, flags: int) -> Pixels | None:
    try:
        array: Pixels | None = cv2.imdecode(np.frombuffer(payload, np.uint8), flags)
    except cv2.error:
        return None
    return array
