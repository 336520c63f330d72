"""The bytes of a packed image or mask in, its pixels out; None where OpenCV cannot make them of it."""

import cv2
import numpy as np
from numpy.typing import NDArray

# Packing removed EXIF orientation; a tag that is there all the same must not turn the image under its mask.
_UPRIGHT_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# By 1/size. The flags GRAYSCALE_N ask for the size alone; COLOR_N would add the order BGR.
REDUCED = {
    1: _UPRIGHT_RGB,
    2: _UPRIGHT_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: _UPRIGHT_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
}


def decode_image(data: bytes, reduction: int = 1) -> NDArray[np.uint8] | None:
    """RGB (H, W, 3) as stored, not turned, at 1/`reduction` of its size."""
    return _imdecode(data, REDUCED[reduction])


def decode_mask(data: bytes) -> NDArray[np.uint8] | None:
    """Labels (H, W)."""
    return _imdecode(data, cv2.IMREAD_GRAYSCALE)


def _imdecode(data: bytes, flags: int) -> NDArray[np.uint8] | None:
    try:
        array: NDArray[np.uint8] | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return array
