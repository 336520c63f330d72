"""The bytes of one mask file in; its labels, and the bytes of an 8-bit gray PNG with the same labels out."""

import struct
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcn_dist.data.decoders import decode_mask
from fcn_dist.data.scenes.images import (
    UNDECODABLE,
    FileProblem,
    load_picture,
    max_bytes,
    open_picture,
    orientation_of,
)
from fcn_dist.data.scenes.wholeness import plain_mask_size

GRAY, PALETTE, GRAY_ALPHA = 0, 3, 4  # PNG colour types that hold labels
_HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, interlace
_HEADER_AT = 16  # after signature, chunk length and chunk name
# Pillow stretches small gray values over 0-255: https://www.w3.org/TR/png-3/#13Sample-depth-rescaling
_GRAY_SCALE = {1: 1, 2: 85, 4: 17, 8: 1}


@dataclass(frozen=True)
class MaskRead:
    """One decoded mask file."""

    data: bytes
    labels: NDArray[np.uint8]  # (H, W), 0..N
    conversion: str | None  # None: `data` is packed as it is

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.labels.shape
        return height, width


def read_mask(data: bytes, num_classes: int, max_pixels: int) -> MaskRead:
    """Decode one mask file in full; FileProblem if that cannot be done, or its values are no labels of 0..N."""
    return _read_plain(data, num_classes, max_pixels) or _read_any(data, num_classes, max_pixels)


def _read_plain(data: bytes, num_classes: int, max_pixels: int) -> MaskRead | None:
    """A mask that is packed as it is and has nothing to complain of, at the cost of one decoding; else None."""
    size = plain_mask_size(data) if len(data) <= max_bytes(max_pixels) else None
    if size is None or size[0] * size[1] > max_pixels:
        return None
    labels = decode_mask(data)
    if labels is None or labels.shape != size or labels.max() > num_classes:
        return None
    return MaskRead(data, labels, None)


def _read_any(data: bytes, num_classes: int, max_pixels: int) -> MaskRead:
    picture = open_picture(data, max_pixels)
    load_picture(picture, data)
    if picture.format != "PNG":
        raise FileProblem("mask that is no PNG", f"it holds {picture.format}; save the labels as PNG")
    _, _, bits, colour_type, _, _, interlaced = _HEADER.unpack_from(data, _HEADER_AT)
    if colour_type not in (GRAY, PALETTE) and (colour_type, bits) != (GRAY_ALPHA, 8):
        raise FileProblem(
            "mask in colour",
            f"it holds {picture.mode}, from which labels cannot be told; save label numbers as 8-bit gray",
        )
    values = _raw_values(picture, bits, colour_type)
    highest = int(values.max())
    if highest > num_classes:
        pixels = int(np.count_nonzero(values > num_classes))
        raise FileProblem(
            f"label above {num_classes}",
            f"it holds label {highest} ({pixels} pixels above {num_classes}); 0 is other, classes are 1.."
            f"{num_classes}; correct the mask, or add the classes to the objectInfo file",
        )
    labels = values.astype(np.uint8)
    conversion = _conversion(picture, bits, colour_type, bool(interlaced))
    # What is packed as it is must be to training what it is to Pillow.
    decoded = labels if conversion else decode_mask(data)
    if decoded is None or not np.array_equal(labels, decoded):
        raise FileProblem(UNDECODABLE, "OpenCV decodes it otherwise than Pillow; save it as a plain 8-bit gray PNG")
    return MaskRead(data, labels, conversion)


def _raw_values(picture: Image.Image, bits: int, colour_type: int) -> NDArray[np.uint8 | np.uint16]:
    values: NDArray[np.uint8 | np.uint16] = np.asarray(picture)
    if colour_type == PALETTE:
        return values  # indices, whatever their colours
    if colour_type == GRAY_ALPHA:
        return values[..., 0]
    if bits == 16:
        return values.astype(np.uint16)
    return values.astype(np.uint8) // _GRAY_SCALE[bits]


def _conversion(picture: Image.Image, bits: int, colour_type: int, interlaced: bool) -> str | None:
    if colour_type == PALETTE:
        return "palette mask to its indices"
    if colour_type == GRAY_ALPHA or "transparency" in picture.info:
        return "mask without its transparency"
    if bits != 8:
        return f"{bits}-bit mask to 8-bit"
    if orientation_of(picture) != 1:
        return "mask without its orientation tag"
    return "interlaced mask to plain" if interlaced else None


def encode_png(labels: NDArray[np.uint8]) -> bytes:
    """(H, W) labels as an 8-bit gray PNG."""
    # Rows of labels repeat better than their differences do: without a filter files are a sixth smaller, and take half
    # the time to decode.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    _, encoded = cv2.imencode(".png", labels, options)
    return encoded.tobytes()
