"""The bytes of a JPEG or PNG in; out, whether its structure is that of a whole, plain file.

OpenCV decodes what training reads, but how much of a cut file it lets pass depends on its version. What these
functions vouch for may be decoded by it alone; of anything else Pillow is asked, which is slower.
"""

import re
from struct import Struct
from zlib import crc32

PROGRESSIVE, END_OF_IMAGE, START_OF_SCAN, FILL = 0xC2, 0xD9, 0xDA, 0xFF
# Within a scan 0xFF is followed by 0, by one of eight restart markers, or by fill bytes: anything else ends it.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = Struct(">I4s")  # length and name
_CHECKSUM = Struct(">I")
_HEADER = Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, interlace
_PLAIN_GRAY = (8, 0, 0, 0, 0)
# Chunks that change neither a gray value nor its place. Text can hold an orientation, so it is not among them.
_HARMLESS = {b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB"}


def is_whole_jpeg(data: bytes) -> bool:
    """Whether segments and scans lead without a gap from the start to the end of the image.

    A file that is not progressive must have one scan; few have one a channel. What follows the end of the image is not
    looked at, and neither is what the scans hold.
    """
    if data[:2] != b"\xff\xd8":
        return False
    position, scans, progressive = 2, 0, False
    while position + 4 <= len(data) and data[position] == FILL:
        marker = data[position + 1]
        if marker == FILL:
            position += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= END_OF_IMAGE:  # it has no length
            break
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if length < 2:
            return False
        position += 2 + length
        progressive |= marker == PROGRESSIVE
        if marker == START_OF_SCAN:
            if scans and not progressive:
                return False
            end = _END_OF_SCAN.search(data, position)
            if end is None:
                return False
            position, scans = end.start(), scans + 1
    return scans > 0 and data[position : position + 2] == bytes([FILL, END_OF_IMAGE])


def plain_mask_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an 8-bit gray PNG with sound checksums and nothing unusual about it; None of any other."""
    if data[:8] != PNG_SIGNATURE:
        return None
    position, names, view = 8, [], memoryview(data)
    while position + _CHUNK.size <= len(data):
        length, name = _CHUNK.unpack_from(data, position)
        start, end = position + _CHUNK.size, position + _CHUNK.size + length
        if end + _CHECKSUM.size > len(data):
            return None
        if crc32(view[position + 4 : end]) != _CHECKSUM.unpack_from(data, end)[0]:
            return None
        names.append(name)
        position = end + _CHECKSUM.size
        if name == b"IHDR":
            if length != _HEADER.size:
                return None
            width, height, *form = _HEADER.unpack_from(data, start)
    inner = [name for name in names if name not in _HARMLESS]
    if position != len(data) or names[:1] != [b"IHDR"] or names[-1] != b"IEND":
        return None
    if set(inner[1:-1]) != {b"IDAT"} or tuple(form) != _PLAIN_GRAY or not width or not height:
        return None
    return height, width
