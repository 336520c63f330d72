"""The bytes of one image file in; what it holds, and the bytes of an upright RGB JPEG out.

A JPEG in RGB is kept byte for byte. What loses no meaning is converted, and each conversion is named.
"""

import io
import warnings
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

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
    """One decoded image file and what packing must do with it."""

    data: bytes
    picture: Image.Image  # RGB, or L for a grayscale JPEG; not yet turned
    orientation: int = 1
    conversions: tuple[str, ...] = ()  # none: `data` is packed as it is

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as it will be packed, before any shrinking."""
        turned = TURNED in self.conversions and self.orientation in SIDEWAYS
        width, height = self.picture.size[::-1] if turned else self.picture.size
        return height, width

    def pixels(self) -> NDArray[np.uint8]:
        """The (H, W, 3) RGB image as it will be packed, before any shrinking."""
        picture = ImageOps.exif_transpose(self.picture) if TURNED in self.conversions else self.picture
        return np.asarray(picture.convert("RGB"))


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A decoded Pillow image; FileProblem if it is too large, damaged, or several images in one."""
    # Pillow's own cap only warns, and is global; ours is checked before anything is decoded.
    pillow_cap, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            return _decoded(data, max_pixels)
    except FileProblem:
        raise
    except UnidentifiedImageError as error:
        raise FileProblem(UNDECODABLE, f"it is none of {', '.join(FORMATS)}; restore it from its source") from error
    except Exception as error:  # decoders raise whatever the damage leads them to
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileProblem(UNDECODABLE, f"{detail}; restore it from its source") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_cap


def _decoded(data: bytes, max_pixels: int) -> Image.Image:
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > max_pixels:
        raise FileProblem(
            "too many pixels",
            f"{width}x{height} are {width * height}, at most {max_pixels} are allowed; shrink it, or raise "
            "--max-pixels",
        )
    if picture.format not in JPEG_FORMATS and getattr(picture, "n_frames", 1) > 1:
        raise FileProblem("several frames", "one picture is needed; keep one frame")
    if picture.format == "PNG":
        # Decoding stops at the last row, and looks neither at checksums nor at the end of the file.
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    picture.load()
    return picture


def orientation_of(picture: Image.Image) -> int:
    """1..8 as in EXIF; 1 where there is no tag, or none that means anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tag = picture.getexif().get(ORIENTATION_TAG, 1)
    return int(tag) if tag in range(1, 9) else 1


def read_image(data: bytes, max_pixels: int) -> ImageRead:
    """Decode one image file in full; FileProblem if that cannot be done, or not without loss."""
    picture = open_picture(data, max_pixels)
    orientation = orientation_of(picture)
    if picture.format not in JPEG_FORMATS:
        return ImageRead(data, _to_rgb(picture), orientation, tuple(_foreign_kinds(data, picture)))
    if picture.mode == "RGB":
        # Training decodes with OpenCV, which must be able to; an eighth of the size shows that at little cost.
        if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) is None:
            raise FileProblem("undecodable or truncated file", "OpenCV cannot decode it; save it as a baseline JPEG")
        return ImageRead(data, picture, orientation)
    if picture.mode == "L":
        return ImageRead(data, picture, orientation, (GRAYSCALE,))
    return ImageRead(data, picture, orientation, (f"{picture.mode} JPEG to RGB",))


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
