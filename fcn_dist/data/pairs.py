"""One decoded image and its decoded mask in; what is packed of them out."""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.images import ImageRead, encode_image, encode_jpeg, fit_to_mask, read_image
from fcn_dist.data.masks import MaskRead, encode_png, read_mask

DEFAULT_MAX_PIXELS = 2**26
DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class PairRules:
    """What a pair must keep to, and how it is converted."""

    num_classes: int
    max_pixels: int = DEFAULT_MAX_PIXELS
    short_side: int | None = None  # scenes with a longer one are shrunk to it
    quality: int = DEFAULT_QUALITY  # of images that have to be encoded anew


class EncodedPair(NamedTuple):
    """What is packed of one pair."""

    image: bytes
    mask: bytes


@dataclass(frozen=True)
class PairRead:
    """An image and a mask that fit each other."""

    image: ImageRead
    mask: MaskRead
    rules: PairRules

    @classmethod
    def join(cls, image: ImageRead, mask: MaskRead, rules: PairRules) -> "PairRead":
        """Raises FileProblem if the image is of another size than its mask, turned or not."""
        return cls(fit_to_mask(image, mask.size), mask, rules)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as packed."""
        height, width = self.mask.size
        short, wanted = min(height, width), self.rules.short_side
        if wanted is None or short <= wanted:
            return height, width
        return max(1, round(height * wanted / short)), max(1, round(width * wanted / short))

    @property
    def conversions(self) -> tuple[str, ...]:
        """What happens to the pair; if nothing, both files are packed byte for byte."""
        of_mask = (self.mask.conversion,) if self.mask.conversion else ()
        shrunk = (f"shrunk to a short side of {self.rules.short_side}",) if self._shrinks else ()
        return (*self.image.conversions, *of_mask, *shrunk)

    @property
    def _shrinks(self) -> bool:
        return self.size != self.mask.size

    def encode(self) -> EncodedPair:
        """Image and mask as packed."""
        if not self._shrinks:
            mask = encode_png(self.mask.labels) if self.mask.conversion else self.mask.data
            return EncodedPair(encode_image(self.image, self.rules.quality), mask)
        size = self.size[::-1]
        pixels = _resized(self.image.pixels(), size, cv2.INTER_AREA)
        labels = _resized(self.mask.labels, size, cv2.INTER_NEAREST_EXACT)
        return EncodedPair(encode_jpeg(pixels, self.rules.quality), encode_png(labels))


def _resized(array: NDArray[np.uint8], size: tuple[int, int], interpolation: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(array, size, interpolation=interpolation), np.uint8)


def read_pair(image: bytes, mask: bytes, rules: PairRules) -> PairRead:
    """Decode both in full; FileProblem if one is damaged, or they do not fit."""
    return PairRead.join(
        read_image(image, rules.max_pixels), read_mask(mask, rules.num_classes, rules.max_pixels), rules
    )
