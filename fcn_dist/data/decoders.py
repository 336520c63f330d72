"""The bytes of a packed image or mask in, its pixels out, by the decoder that training uses."""

import cv2
import numpy as np
from numpy.typing import NDArray


def decode_image(data: bytes) -> NDArray[np.uint8] | None:
    """RGB (H, W, 3) by the decoder that training uses, as stored, not turned; None if it cannot."""
    return _imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode_mask(data: bytes) -> NDArray[np.uint8] | None:
    """Labels (H, W) of a packed mask by the decoder that training uses; None if it cannot."""
    return _imdecode(data, cv2.IMREAD_GRAYSCALE)


def _imdecode(data: bytes, flags: int) -> NDArray[np.uint8] | None:
    try:
        array: NDArray[np.uint8] | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return array
