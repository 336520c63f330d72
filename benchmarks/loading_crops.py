"""An encoded pair in; the 256 x 256 crop that is trained on out: the ways in which peers' users, or we, do that.

All of them resize by a log-uniform factor of 0.5 to 2, crop at a random place, pad what is smaller, mirror every
other one, and turn label 0 into the one that is ignored. Out come uint8 arrays, (256, 256, 3) RGB and (256, 256).
"""

import math
import random
from functools import lru_cache
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fcn_dist.config import DataConfig
from fcn_dist.data.headers import png_size
from fcn_dist.data.shard import Sample
from fcn_dist.data.transforms import crop_into, decode, draw_window, generator
from fcn_dist.keys import Purpose

SIZE = 256
SCALE = (0.5, 2.0)
CONFIG = DataConfig(crop=(SIZE, SIZE), scale=SCALE, flip=0.5)
SEED = 0
GREY = (114, 114, 114)

Pixels = NDArray[np.uint8]
Crop = tuple[Pixels, Pixels]


def with_pillow(image: bytes, mask: bytes) -> Crop:
    """Decode, resize and crop with Pillow, as a torch data set usually does it."""
    return augment(Image.open(BytesIO(image)).convert("RGB"), Image.open(BytesIO(mask)))


def augment(picture: Image.Image, labels: Image.Image) -> Crop:
    """What follows decoding in `with_pillow`."""
    low, high = SCALE
    factor = math.exp(random.uniform(math.log(low), math.log(high)))
    size = (round(picture.width * factor), round(picture.height * factor))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    labels = labels.resize(size, Image.Resampling.NEAREST)
    short = (max(0, SIZE - size[0]), max(0, SIZE - size[1]))
    if any(short):
        border = (short[0] // 2, short[1] // 2, short[0] - short[0] // 2, short[1] - short[1] // 2)
        picture, labels = ImageOps.expand(picture, border, GREY), ImageOps.expand(labels, border, 0)
    left = random.randint(0, picture.width - SIZE)
    top = random.randint(0, picture.height - SIZE)
    box = (left, top, left + SIZE, top + SIZE)
    picture, labels = picture.crop(box), labels.crop(box)
    if random.random() < CONFIG.flip:
        picture, labels = ImageOps.mirror(picture), ImageOps.mirror(labels)
    return np.array(picture), np.array(labels) - np.uint8(1)  # 0 wraps to 255


def with_ours(image: bytes, mask: bytes) -> Crop:
    """Decode and crop with this package's functions: OpenCV, and only what is shown is resized."""
    image_out = np.full((SIZE, SIZE, 3), GREY[0], np.uint8)
    mask_out = np.zeros((SIZE, SIZE), np.uint8)
    cut(Sample("", image, mask), random.getrandbits(32), image_out, mask_out)
    return image_out, mask_out - np.uint8(1)


def cut(sample: Sample, position: int, image_out: Pixels, mask_out: Pixels) -> None:
    """What our loader does with one sample once it is read, from its draws to its crop."""
    size = png_size(sample.mask)
    assert size, sample.key
    window = draw_window(generator(SEED, position, Purpose.CROP), *size, CONFIG)
    crop_into(window, *decode(sample, window.reduction), image_out, mask_out)


def with_nothing(image: bytes, mask: bytes) -> Crop:
    """Read, but not decoded: always the same crop, so that only reading and handing over are left."""
    return constant()


@lru_cache(maxsize=1)
def constant() -> Crop:
    """Nothing but zeros."""
    return np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((SIZE, SIZE), np.uint8)


def start_worker(*_: Any) -> None:
    """One thread each, as in our own loader: the processes are the parallelism."""
    cv2.setNumThreads(0)


CROPS = {"Pillow": with_pillow, "our crop": with_ours, "no decoding": with_nothing}
