"""What synthetic scenes are drawn with: a canvas, a pinhole camera and textures in; an image and its labels out.

Drawing happens at twice the final size, so that edges come out smooth. World coordinates are metres: X to the
right of the camera, Y up from the ground, Z away from the camera. Colours are RGB, 0-255.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Colour = Sequence[float]
Point = tuple[float, float, float]
Image = NDArray[np.uint8]
Floats = NDArray[np.float32]
Box = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]  # ranges of X, Y, Z

SUPERSAMPLING = 2


class Label(IntEnum):
    """The raw labels, ordered by area as in the benchmark's table."""

    OTHER = 0
    WALL = 1
    ROAD = 2
    SKY = 3
    MOUNTAIN = 4
    GRASS = 5
    BUILDING = 6
    TREE = 7
    CEILING = 8
    FLOOR = 9
    BED = 10
    WATER = 11
    CAR = 12
    WINDOW = 13
    PAINTING = 14
    SIDEWALK = 15


# How strongly a class's surface varies: from pixel to pixel, and in patches.
_GRAIN = {Label.TREE: 0.16, Label.GRASS: 0.12, Label.ROAD: 0.07, Label.SIDEWALK: 0.04, Label.MOUNTAIN: 0.06}
_PATCHES = {Label.TREE: 0.10, Label.GRASS: 0.09, Label.ROAD: 0.03, Label.BED: 0.03, Label.FLOOR: 0.03}
_CIRCLE = np.array([(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 20, endpoint=False)])
# Nobody can say where leaves end or a car's shadow begins: these get an outline of "other".
_OUTLINED = (Label.TREE, Label.CAR)


@dataclass(frozen=True)
class Camera:
    """A level pinhole camera over the origin, looking along Z; lengths in canvas pixels, `height` in metres."""

    focal: float
    x: float
    y: float
    height: float

    def project(self, *points: Point) -> Floats:
        """Canvas positions (N, 2) of world points, all of which lie before the camera."""
        x, y, z = np.asarray(points, np.float32).T
        return np.stack([self.x + self.focal * x / z, self.y + self.focal * (self.height - y) / z], axis=1)

    def scale(self, z: float) -> float:
        """Pixels per metre at distance z."""
        return self.focal / z


class Canvas:
    """An image and its labels, painted together."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height * SUPERSAMPLING, width * SUPERSAMPLING
        self.image: Image = np.zeros((self.height, self.width, 3), np.uint8)
        self.labels: Image = np.zeros((self.height, self.width), np.uint8)
        self.tint: Colour = (1.0, 1.0, 1.0)  # the light on everything but the sky

    def camera(self, rng: np.random.Generator, focal: float, height: float, horizon: float) -> Camera:
        """A camera that looks near the middle; `horizon` is a fraction of the height.

        `focal` is a fraction of the width, where width and height are not too different: a long picture shows
        more, but never what lies beside or behind the camera.
        """
        x, y = self.width * rng.uniform(0.4, 0.6), self.height * (horizon + rng.uniform(-0.06, 0.06))
        extent = max(min(self.width, 1.3 * self.height), 0.5 * self.width, 0.8 * self.height)
        return Camera(focal * extent, x, y, height)

    def polygon(self, points: ArrayLike, colour: Colour, label: int | None) -> None:
        """Fill a polygon; with label None the labels below stay."""
        corners = np.round(np.asarray(points, np.float64) * 16).astype(np.int32)
        cv2.fillPoly(self.image, [corners], tuple(map(float, colour)), shift=4)
        if label is not None:
            cv2.fillPoly(self.labels, [corners], int(label), shift=4)

    def disc(self, x: float, y: float, radii: tuple[float, float], colour: Colour, label: int | None) -> None:
        """Fill an upright ellipse."""
        self.polygon(_CIRCLE * radii + np.array((x, y)), colour, label)

    def paint(self, region: NDArray[np.bool_], colours: Floats, label: int, top: int = 0) -> None:
        """Put `colours` where `region` holds; both cover whole rows of the canvas from row `top` downwards."""
        rows = np.s_[top : top + len(region)]
        # OpenCV's addition rounds and saturates; its copy is ten times as fast as boolean indexing.
        cv2.copyTo(cv2.add(colours, 0, dtype=cv2.CV_8U), region.astype(np.uint8), self.image[rows])
        self.labels[rows][region] = label

    def texture(self, texture: Image, corners: Floats, label: int) -> None:
        """Lay a texture on a quadrilateral: corners (4, 2) from top left clockwise, as the texture has them."""
        low = np.floor(corners.min(axis=0)).clip(0, None).astype(int)
        high = np.minimum(np.ceil(corners.max(axis=0)) + 1, (self.width, self.height)).astype(int)
        if (high <= low).any():
            return
        height, width = texture.shape[:2]
        source = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
        local = (corners - low).astype(np.float32)
        size = (int(high[0] - low[0]), int(high[1] - low[1]))
        homography = cv2.getPerspectiveTransform(source, local)
        patch = cv2.warpPerspective(texture, homography, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        inside = np.zeros(size[::-1], np.uint8)
        cv2.fillPoly(inside, [np.round(local * 16).astype(np.int32)], 1, shift=4)
        window = np.s_[low[1] : high[1], low[0] : high[0]]
        self.image[window] = np.where(inside[..., None] > 0, patch, self.image[window])
        self.labels[window] = np.where(inside > 0, np.uint8(label), self.labels[window])

    def shadow(self, points: Floats, strength: float, blur: float) -> None:
        """Darken a polygon with soft edges; labels stay."""
        corners = np.round(points).astype(np.int32)
        margin = int(3 * blur) + 1
        low = (corners.min(axis=0) - margin).clip(0, None)
        window = np.s_[low[1] : corners[:, 1].max() + margin, low[0] : corners[:, 0].max() + margin]
        mask = np.zeros(self.labels[window].shape, np.float32)
        if mask.size:
            cv2.fillPoly(mask, [corners - low], strength)
            mask = 1 - cv2.GaussianBlur(mask, None, blur)
            self.image[window] = self.image[window] * mask[..., None]

    def box(self, camera: Camera, box: Box, colour: ArrayLike, label: int, lit: float = 0.8, top: float = 1.12) -> None:
        """A box on the ground: the faces that the camera sees, each in its own light."""
        (x0, x1), (y0, y1), (z0, z1) = box
        base = np.asarray(colour, np.float32)
        side = x0 if x0 > 0 else x1 if x1 < 0 else None
        if side is not None:
            quad = camera.project((side, y0, z0), (side, y0, z1), (side, y1, z1), (side, y1, z0))
            self.polygon(quad, (base * lit).clip(0, 255).tolist(), label)
        if y1 < camera.height:
            quad = camera.project((x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1))
            self.polygon(quad, (base * top).clip(0, 255).tolist(), label)
        quad = camera.project((x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0))
        self.polygon(quad, base.clip(0, 255).tolist(), label)

    def develop(self, rng: np.random.Generator) -> tuple[Image, Image]:
        """The finished image (H, W, 3) and labels (H, W): surfaces, light, lens, sensor, outlines of "other"."""
        grain, patches = (
            np.array([amounts.get(label, 0.012) for label in Label], np.float32)[self.labels]
            for amounts in (_GRAIN, _PATCHES)
        )
        shape = (self.height, self.width)
        light = 1 + grain * noise(rng, shape, 1.5) + patches * noise(rng, shape, 9)
        picture = cv2.multiply(self.image, cv2.merge([light, light, light]), dtype=cv2.CV_32F)
        size = (self.width // SUPERSAMPLING, self.height // SUPERSAMPLING)
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        lit = cv2.resize((self.labels != Label.SKY).astype(np.float32), size, interpolation=cv2.INTER_AREA)
        picture *= 1 + lit[..., None] * (np.asarray(self.tint, np.float32) - 1)
        picture = cv2.GaussianBlur(picture, None, rng.uniform(0.2, 0.5))
        y, x = np.ogrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
        vignette = (rng.uniform(0.94, 1.06) * (1 - 0.09 * (x**2 + y**2))).astype(np.float32)
        picture = picture * vignette[..., None]
        picture += rng.standard_normal(picture.shape, np.float32) * rng.uniform(1.0, 3.5)
        labels = self.labels[1::SUPERSAMPLING, 1::SUPERSAMPLING].copy()
        _outline(labels)
        return np.clip(picture, 0, 255).round().astype(np.uint8), labels


def _outline(labels: Image) -> None:
    kernel = np.ones((3, 3), np.uint8)
    for label in _OUTLINED:
        region = (labels == label).astype(np.uint8)
        if region.any():
            labels[cv2.dilate(region, kernel) > region] = Label.OTHER


def noise(
    rng: np.random.Generator, shape: tuple[int, int], cell: float | tuple[float, float], octaves: int = 1
) -> Floats:
    """Smooth noise of unit variance or so; `cell` is the size of its patches in pixels (height, width)."""
    high, wide = cell if isinstance(cell, tuple) else (cell, cell)
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        rows, columns = (int(n * 2**octave / c) + 3 for n, c in zip(shape, (high, wide), strict=True))
        coarse = rng.standard_normal((rows, columns), np.float32)
        total += cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_LINEAR) / 2**octave
    return total


def vary(rng: np.random.Generator, colour: Colour, amount: float = 12) -> Floats:
    """A colour near the given one: mostly lighter or darker, a little of another hue."""
    shifted = np.asarray(colour) + rng.normal(0, amount) + rng.normal(0, amount / 3, 3)
    return np.clip(shifted, 0, 255).astype(np.float32)


def mix(a: ArrayLike, b: ArrayLike, share: float) -> Floats:
    """The colour between a (share 0) and b (share 1)."""
    return (np.asarray(a, np.float32) * (1 - share) + np.asarray(b, np.float32) * share).astype(np.float32)
