"""Image files of any kind in, the pixels as a viewer shows them out."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fcn_dist.errors import UserError

# Below Pillow's own warning at 89 megapixels; a network at full width needs about 700 bytes a pixel.
MAX_PIXELS = 64_000_000
CELL = 32  # pixels: the network makes a whole cell of less, which takes as much memory
LONGEST = 1_000_000  # pixels of a side, as PNG has it in practice


class TooManyPixels(UserError):
    """A whole image, as far as its header tells, but too large."""


def read_rgb(
    source: Path | BinaryIO, name: str = "", max_pixels: int | None = None, kinds: tuple[str, ...] | None = None
) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) uint8 as a viewer shows them: upright by their EXIF orientation, any mode turned to RGB, what is
    transparent on white.

    Errors call an open file `name`. Of `kinds` alone, in Pillow's terms, or of any that Pillow reads. Raises
    TooManyPixels above `max_pixels` (by default MAX_PIXELS), and UserError if it is no whole image.
    """
    name, most = name or str(source), MAX_PIXELS if max_pixels is None else max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=kinds) as image:
                width, height = image.size
                # The header tells the size; decoding what is too large could exhaust the memory.
                if max(width, CELL) * max(height, CELL) > most:
                    counted = f" ({CELL} at least count on each side)" if min(width, height) < CELL else ""
                    raise TooManyPixels(
                        f"{name} is {width}x{height}; at most {most:,} pixels{counted} are needed; shrink it"
                    )
                if max(width, height) > LONGEST:
                    raise TooManyPixels(f"{name} is {width}x{height}; sides of at most {LONGEST:,} are needed; cut it")
                if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                    raise UserError(
                        f"{name} holds numbers of 32 bits, of which none is known to be white; an image of 8 or 16 "
                        "bits is needed; convert it"
                    )
                upright = ImageOps.exif_transpose(image)
                return np.array(_on_white(_eight_bits(upright)))
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit
        raise TooManyPixels(f"{name} has far too many pixels; at most {most:,} are needed; shrink it") from error
    except Exception as error:  # decoders of damaged files raise whatever they trip over
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is no {', '.join(kinds)} file" if kinds else "it is of no known kind"
        raise UserError(f"{name} cannot be decoded ({reason}); a whole image file is needed; replace it") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grayscale scaled down, which Pillow would clip to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")  # whose transparent pixels have colours, too, that nobody sees
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
