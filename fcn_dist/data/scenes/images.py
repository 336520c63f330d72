"""The bytes of one image file in; what it holds, and the bytes of an upright RGB JPEG out.

A JPEG in RGB is kept byte for byte. What loses no meaning is converted, and each conversion is named.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fcn_dist.data.decoders import decode_image
from fcn_dist.data.scenes.wholeness import is_whole_jpeg

JPEG_FORMATS = ("JPEG", "MPO")  # MPO: several JPEGs in one file, of which readers take the first
# Pillow knows formats that start other programs (EPS); only these are ever opened. (It opens MPO as JPEG.)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
ORIENTATION_TAG = 0x0112
PNG_BITS_AT = 24  # where a PNG's header has the bits of one channel
UPRIGHT, SIDEWAYS = (1,), (5, 6, 7, 8)  # EXIF orientations; SIDEWAYS exchange height and width
TAG_DROPPED = "orientation tag dropped"
TURNED = "turned upright by its orientation tag"
UNDECODABLE = "undecodable or truncated file"
GRAYSCALE = "grayscale JPEG to RGB"
MAX_GRAY_ERROR = 2  # levels by which a pixel may differ after a grayscale JPEG has become RGB


class FileProblem(Exception):
    """Why one file cannot be packed: a kind to count by, and what was found and is needed."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class ImageRead:
    """One image file that was decoded in full, and what packing must do with it."""

    data: bytes
    picture: Image.Image  # RGB, or L for a grayscale JPEG; not yet turned; a JPEG's pixels may not be loaded yet
    orientation: int = 1
    conversions: tuple[str, ...] = ()  # none: `data` is packed as it is
    decoded: NDArray[np.uint8] | None = None  # (H, W, 3) RGB as training decodes `data`; None if it must be converted

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as it will be packed, before any shrinking."""
        turned = TURNED in self.conversions and self.orientation in SIDEWAYS
        width, height = self.picture.size[::-1] if turned else self.picture.size
        return height, width

    def pixels(self) -> NDArray[np.uint8]:
        """The (H, W, 3) RGB image as it will be packed, before any shrinking."""
        if self.decoded is not None and TURNED not in self.conversions:
            return self.decoded
        with _decoding():
            picture = ImageOps.exif_transpose(self.picture) if TURNED in self.conversions else self.picture
            return np.asarray(picture.convert("RGB"))


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A Pillow image of which only the header is read; FileProblem if that says it is too large, or nothing."""
    too_long = max_bytes(max_pixels)
    if len(data) > too_long:
        raise FileProblem("file too large", f"{len(data)} bytes, for which {too_long} are allowed; save it anew")
    with _decoding():
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > max_pixels:
        raise FileProblem(
            "too many pixels",
            f"{width}x{height} are {width * height}, at most {max_pixels} are allowed; shrink it, or raise "
            "--max-pixels",
        )
    return picture


def max_bytes(max_pixels: int) -> int:
    """What a file of so many pixels may hold: 16-bit RGBA uncompressed, and 16 MiB of other things."""
    return 8 * max_pixels + 2**24


def load_picture(picture: Image.Image, data: bytes) -> None:
    """Decode the picture in full; FileProblem if it is damaged, or several images in one."""
    with _decoding():
        if picture.format not in JPEG_FORMATS and getattr(picture, "n_frames", 1) > 1:
            raise FileProblem("several frames", "one picture is needed; keep one frame")
        if picture.format == "PNG":
            # Decoding stops at the last row, and looks neither at checksums nor at the end of the file.
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
        picture.load()


@contextmanager
def _decoding() -> Iterator[None]:
    """What Pillow raises becomes a FileProblem, and what it warns of is not said."""
    # Pillow's own cap only warns, and is global; ours is checked before anything is decoded.
    pillow_cap, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            yield
    except FileProblem:
        raise
    except UnidentifiedImageError as error:
        raise FileProblem(UNDECODABLE, f"it is none of {', '.join(FORMATS)}; restore it from its source") from error
    except Exception as error:  # decoders raise whatever the damage leads them to
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileProblem(UNDECODABLE, f"{detail}; restore it from its source") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_cap


def orientation_of(picture: Image.Image) -> int:
    """1..8 as in EXIF; 1 where there is no tag, or none that means anything."""
    try:
        with _decoding():
            tag = picture.getexif().get(ORIENTATION_TAG, 1)
    except FileProblem:
        return 1  # metadata that cannot be read turns an image for nobody
    return int(tag) if tag in range(1, 9) else 1


def read_image(data: bytes, max_pixels: int) -> ImageRead:
    """Decode one image file in full; FileProblem if that cannot be done, or not without loss."""
    picture = open_picture(data, max_pixels)
    plain = picture.format in JPEG_FORMATS and picture.mode == "RGB"
    # One decoder is enough where the file is whole for certain; and it is the one that training uses.
    decoded = _decoded(data, picture) if plain and is_whole_jpeg(data) else None
    if decoded is None:
        load_picture(picture, data)
    orientation = orientation_of(picture)
    if picture.format not in JPEG_FORMATS:
        return ImageRead(data, _to_rgb(picture), orientation, tuple(_foreign_kinds(data, picture)))
    if not plain:
        kind = GRAYSCALE if picture.mode == "L" else f"{picture.mode} JPEG to RGB"
        return ImageRead(data, picture, orientation, (kind,))
    if decoded is None:
        decoded = _decoded(data, picture)
    if decoded is None:
        raise FileProblem(UNDECODABLE, "OpenCV cannot decode it; save it as a baseline JPEG")
    return ImageRead(data, picture, orientation, (), decoded)


def _decoded(data: bytes, picture: Image.Image) -> NDArray[np.uint8] | None:
    pixels = decode_image(data)
    return pixels if pixels is not None and pixels.shape[1::-1] == picture.size else None


def _foreign_kinds(data: bytes, picture: Image.Image) -> list[str]:
    kinds = [f"{picture.format} in a .jpg to JPEG"]
    if picture.mode.startswith("I;16") or (picture.format == "PNG" and data[PNG_BITS_AT] == 16):
        kinds.append("16-bit image to 8-bit")
    return kinds


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        gray = np.asarray(picture).astype(np.uint16) >> 8
        rgb = Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    elif picture.mode in ("I", "F"):
        raise FileProblem("32-bit image", f"its range is not known (mode {picture.mode}); save it with 8 bits")
    elif picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            raise FileProblem("transparent image", "transparent pixels have no colour; save it without alpha")
        rgb = rgba.convert("RGB")
    else:
        rgb = picture.convert("RGB")
    # exif_transpose reads the tag from the picture it turns.
    exif = picture.getexif()
    rgb.getexif().update({ORIENTATION_TAG: exif[ORIENTATION_TAG]} if ORIENTATION_TAG in exif else {})
    return rgb


def fit_to_mask(image: ImageRead, mask_size: tuple[int, int]) -> ImageRead:
    """Settle by the mask's (height, width) whether the image was annotated turned or not; FileProblem if neither.

    A person annotates what a viewer shows, the image turned by its tag. In no case does the tag stay: it would
    turn the image under some readers and not under others.
    """
    if image.orientation not in UPRIGHT:
        turned = replace(image, conversions=(*image.conversions, TURNED))
        if turned.size == mask_size:
            return turned
        image = replace(image, conversions=(*image.conversions, TAG_DROPPED))
    if image.size != mask_size:
        (height, width), (mask_height, mask_width) = image.size, mask_size
        raise FileProblem(
            "size mismatch",
            f"the image has {width}x{height} pixels, its mask {mask_width}x{mask_height}; both must be alike",
        )
    return image


def encode_image(image: ImageRead, quality: int) -> bytes:
    """The bytes to pack, encoded anew only where they must be."""
    if not image.conversions:
        return image.data
    if image.conversions == (TAG_DROPPED,):
        return strip_metadata(image.data)
    if image.conversions in ((GRAYSCALE,), (GRAYSCALE, TAG_DROPPED)):
        return _gray_to_rgb(image)
    return encode_jpeg(image.pixels(), quality)


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """RGB (H, W, 3) as a JPEG with full-resolution colour."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _gray_to_rgb(image: ImageRead) -> bytes:
    # With the file's own quantisation the same coefficients come out, but for rounding; where clipped pixels
    # make them differ, the finest quantisation is used.
    pixels = image.pixels()
    tables: dict[int, list[int]] = image.picture.quantization  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", qtables=[next(iter(tables.values()))], subsampling=0)
    again = np.asarray(Image.open(buffer)).astype(np.int16)
    return buffer.getvalue() if np.abs(again - pixels).max() <= MAX_GRAY_ERROR else encode_jpeg(pixels, 100)


def strip_metadata(jpeg: bytes) -> bytes:
    """The same JPEG without its APP1 segments (EXIF and XMP, both of which can hold an orientation)."""
    kept, position = bytearray(jpeg[:2]), 2
    while jpeg[position] == 0xFF and jpeg[position + 1] != 0xDA:  # up to the start of scan
        if jpeg[position + 1] == 0xFF:  # fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if jpeg[position + 1] != 0xE1:
            kept += jpeg[position:end]
        position = end
    return bytes(kept) + jpeg[position:]
