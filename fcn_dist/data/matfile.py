"""A MATLAB file in; one matrix of bytes out. That is all this package needs of the format, and scipy, which
reads all of it, takes longer to load than a small data set to pack.

https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf, level 5
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_HEADER = 128
_UINT8, _MATRIX, _COMPRESSED = 2, 14, 15  # types of data elements
_UINT8_CLASS = 9
_LARGEST = 2**20  # bytes that are unpacked of a compressed element


def read_uint8_matrix(data: bytes, name: str) -> NDArray[np.uint8]:
    """The uint8 matrix of that name. Raises ValueError, struct.error or zlib.error if there is none."""
    if data[126:128] != b"IM" or len(data) < _HEADER:
        raise ValueError("no little-endian MATLAB file of level 5")
    for kind, element in _elements(data[_HEADER:]):
        if kind == _COMPRESSED:
            ((kind, element), *_) = _elements(zlib.decompressobj().decompress(element, _LARGEST))
        parts = [*_elements(element)] if kind == _MATRIX else []
        if len(parts) >= 4 and parts[2][1] == name.encode():
            return _matrix(parts)
    raise ValueError(f"no matrix {name!r}")


def _matrix(parts: list[tuple[int, bytes]]) -> NDArray[np.uint8]:
    """From flags, dimensions, name and values."""
    (_, flags), (_, dimensions), _, (kind, values), *_ = parts
    if flags[:1] != bytes([_UINT8_CLASS]) or kind != _UINT8:
        raise ValueError("a matrix of uint8 is needed")
    shape = np.frombuffer(dimensions, "<i4")
    return np.frombuffer(values, np.uint8).reshape(shape, order="F")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and contents of each data element."""
    at = 0
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<II", data, at)
        if kind >> 16:  # the short form: length and type in one word, the contents in the next
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        contents = data[at + 8 : at + 8 + length]
        if len(contents) != length:
            raise ValueError("cut short")
        yield kind, contents
        at += 8 + length + (-length % 8 if kind != _COMPRESSED else 0)
