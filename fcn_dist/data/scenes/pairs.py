"""The two files of one pair in; what is packed of them out, or everything that is wrong with them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.decoders import decode_image, decode_mask
from fcn_dist.data.scenes.images import (
    FileProblem,
    ImageRead,
    encode_image,
    encode_jpeg,
    fit_to_mask,
    max_bytes,
    read_image,
)
from fcn_dist.data.scenes.listing import Pair, Problem, SourceFile
from fcn_dist.data.scenes.masks import MaskRead, encode_png, read_mask

DEFAULT_MAX_PIXELS = 2**26
DEFAULT_QUALITY = 95

Read = TypeVar("Read", ImageRead, MaskRead)


@dataclass(frozen=True)
class PairRules:
    """What a pair must keep to, and how it is converted."""

    num_classes: int
    max_pixels: int = DEFAULT_MAX_PIXELS
    short_side: int | None = None  # scenes with a longer one are shrunk to it
    quality: int = DEFAULT_QUALITY  # of images that have to be encoded anew


class PackedPair(NamedTuple):
    """What is packed of one pair."""

    image: bytes
    mask: bytes
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB, as training decodes `image`
    labels: NDArray[np.uint8]  # (H, W), as training decodes `mask`
    conversions: tuple[str, ...]


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

    def pack(self) -> PackedPair:
        """Both files as packed; FileProblem if what was encoded anew does not decode."""
        if not self.conversions:
            assert self.image.decoded is not None, "an image that is packed as it is was decoded"
            return PackedPair(self.image.data, self.mask.data, self.image.decoded, self.mask.labels, ())
        image, mask = self._encode()
        pixels, labels = decode_image(image), decode_mask(mask)
        if pixels is None or labels is None or not pixels.shape[:2] == labels.shape == self.size:
            raise FileProblem("failed conversion", f"OpenCV cannot decode it after: {', '.join(self.conversions)}")
        return PackedPair(image, mask, pixels, labels, self.conversions)

    def _encode(self) -> tuple[bytes, bytes]:
        if not self._shrinks:
            mask = encode_png(self.mask.labels) if self.mask.conversion else self.mask.data
            return encode_image(self.image, self.rules.quality), mask
        size = self.size[::-1]
        pixels = _resized(self.image.pixels(), size, cv2.INTER_AREA)
        labels = _resized(self.mask.labels, size, cv2.INTER_NEAREST_EXACT)
        return encode_jpeg(pixels, self.rules.quality), encode_png(labels)


def _resized(array: NDArray[np.uint8], size: tuple[int, int], interpolation: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(array, size, interpolation=interpolation), np.uint8)


def pack_pair(pair: Pair, rules: PairRules) -> PackedPair | list[Problem]:
    """Read and check both files of a pair, and convert what must be converted."""
    problems: list[Problem] = []

    def read(source: SourceFile, decode: Callable[[bytes], Read]) -> Read | None:
        try:
            return decode(_contents(source, rules.max_pixels))
        except FileProblem as problem:
            problems.append(Problem(source.path, problem.kind, problem.detail))
        return None

    # Both are read whatever becomes of the other, so that all problems come out in one run.
    image = read(pair.image, lambda data: read_image(data, rules.max_pixels))
    mask = read(pair.mask, lambda data: read_mask(data, rules.num_classes, rules.max_pixels))
    if image is None or mask is None:
        return problems
    try:
        return PairRead.join(image, mask, rules).pack()
    except FileProblem as problem:
        return [Problem(pair.image.path, problem.kind, problem.detail)]


def _contents(source: SourceFile, max_pixels: int) -> bytes:
    too_long = max_bytes(max_pixels)
    try:
        with source.path.open("rb") as file:
            facts = os.fstat(file.fileno())
            # One byte more than there may be, so that a file that grows is noticed and none fills the memory.
            data = file.read(min(facts.st_size, too_long) + 1)
    except OSError as error:
        raise FileProblem("unreadable file", f"{error.strerror}; make it readable") from error
    if (facts.st_size, facts.st_mtime_ns) != source[1:] or len(data) != min(source.size, too_long + 1):
        raise FileProblem("changed file", "it has changed since packing began; let no one write there")
    return data
