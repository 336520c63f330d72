"""What a split's pixels add up to: decoded pairs in, class counts and channel mean and standard deviation out."""

from dataclasses import dataclass
from math import sqrt

import cv2
import numpy as np
from numpy.typing import NDArray

Triple = tuple[float, float, float]


@dataclass
class PixelCounts:
    """Exact integer counts, so that their sum does not depend on which process counted what."""

    class_pixels: NDArray[np.int64]  # (N + 1,), labels 0..N
    class_images: NDArray[np.int64]  # (N + 1,), images in which each label occurs
    channels: NDArray[np.int64]  # (3, 256), histograms of R, G, B

    @classmethod
    def zero(cls, num_classes: int) -> "PixelCounts":
        """No pixels yet."""
        labels = num_classes + 1
        return cls(np.zeros(labels, np.int64), np.zeros(labels, np.int64), np.zeros((3, 256), np.int64))

    def add_pair(self, image_rgb: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
        """Count one (H, W, 3) image and its (H, W) labels, none above N."""
        pixels = _histogram(labels)
        assert not pixels[len(self.class_pixels) :].any(), "labels above N were to be refused before"
        self.class_pixels += pixels[: len(self.class_pixels)]
        self.class_images += pixels[: len(self.class_images)] > 0
        for channel in range(3):
            self.channels[channel] += _histogram(image_rgb, channel)

    def add(self, other: "PixelCounts") -> None:
        """Take in what another process has counted."""
        self.class_pixels += other.class_pixels
        self.class_images += other.class_images
        self.channels += other.channels

    def mean_and_std(self) -> tuple[Triple, Triple]:
        """Mean and standard deviation of R, G, B over all pixels, 0-255."""
        (r_mean, r_std), (g_mean, g_std), (b_mean, b_std) = (_moments(histogram) for histogram in self.channels)
        return (r_mean, g_mean, b_mean), (r_std, g_std, b_std)


def _histogram(image: NDArray[np.uint8], channel: int = 0) -> NDArray[np.int64]:
    # OpenCV counts in float32, exact up to 2**24: larger images are counted in bands of rows.
    rows = max(1, 2**24 // image.shape[1])
    bands = (image[top : top + rows] for top in range(0, image.shape[0], rows))
    counts = sum(cv2.calcHist([band], [channel], None, [256], [0, 256]).astype(np.int64) for band in bands)
    return np.asarray(counts, np.int64).ravel()


def _moments(histogram: NDArray[np.int64]) -> tuple[float, float]:
    counts = [int(n) for n in histogram]  # Python's integers do not overflow
    total = sum(counts)
    first = sum(value * n for value, n in enumerate(counts))
    second = sum(value * value * n for value, n in enumerate(counts))
    return first / total, sqrt(total * second - first * first) / total
