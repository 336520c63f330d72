"""What a split's pixels add up to: decoded pairs in, class counts and channel mean and standard deviation out."""

from dataclasses import dataclass
from math import sqrt

import cv2
import numpy as np
from numpy.typing import NDArray

Triple = tuple[float, float, float]
_EXACT_PIXELS = 2**24


@dataclass
class PixelCounts:
    """Exact integer counts, so that their sum does not depend on which process counted what."""

    class_pixels: NDArray[np.int64]  # (N + 1,), labels 0..N
    class_images: NDArray[np.int64]  # (N + 1,), images in which each label occurs
    channel_sums: NDArray[np.int64]  # (3,), of the values of R, G, B
    channel_squares: NDArray[np.int64]  # (3,), of their squares

    @classmethod
    def zero(cls, num_classes: int) -> "PixelCounts":
        """No pixels yet."""
        labels = num_classes + 1
        return cls(*(np.zeros(length, np.int64) for length in (labels, labels, 3, 3)))

    def add_pair(self, image_rgb: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
        """Count one (H, W, 3) image and its (H, W) labels, none above N."""
        # OpenCV counts and sums in floating point, which is exact for so many pixels: larger ones are cut in bands.
        rows = max(1, _EXACT_PIXELS // labels.shape[1])
        pixels = np.zeros(256, np.int64)
        for top in range(0, labels.shape[0], rows):
            pixels += cv2.calcHist([labels[top : top + rows]], [0], None, [256], [0, 256]).ravel().astype(np.int64)
            for channel, plane in enumerate(cv2.split(image_rgb[top : top + rows])):
                self.channel_sums[channel] += round(cv2.sumElems(plane)[0])
                self.channel_squares[channel] += round(cv2.norm(plane, cv2.NORM_L2SQR))
        assert not pixels[len(self.class_pixels) :].any(), "labels above N were to be refused before"
        self.class_pixels += pixels[: len(self.class_pixels)]
        self.class_images += pixels[: len(self.class_images)] > 0

    def add(self, other: "PixelCounts") -> None:
        """Take in what another process has counted."""
        self.class_pixels += other.class_pixels
        self.class_images += other.class_images
        self.channel_sums += other.channel_sums
        self.channel_squares += other.channel_squares

    def mean_and_std(self) -> tuple[Triple, Triple]:
        """Mean and standard deviation of R, G, B over all pixels, 0-255."""
        total = int(self.class_pixels.sum())
        # Python's integers do not overflow.
        moments = [(int(a), int(b)) for a, b in zip(self.channel_sums, self.channel_squares, strict=True)]
        (r_mean, r_std), (g_mean, g_std), (b_mean, b_std) = (
            (first / total, sqrt(total * second - first * first) / total) for first, second in moments
        )
        return (r_mean, g_mean, b_mean), (r_std, g_std, b_std)
