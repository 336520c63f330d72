"""The first bytes of a JPEG or PNG in; its height and width out, before anything is decoded.

Only what baseline and progressive JPEGs and PNGs have in common is read; None means "not such a file".
"""

import struct

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# https://www.w3.org/Graphics/JPEG/itu-t81.pdf, table B.1: start of frame, but for DHT (C4), JPG (C8) and DAC (CC)
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that the frame header states."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def png_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that the IHDR chunk states."""
    if data[:8] != _PNG_SIGNATURE or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return height, width
