"""Amounts of bytes as people write them: "200GB" to 200000000000, and back."""

import re
from fractions import Fraction

from fcn_dist.errors import UserError

# Decimal as disks are sold, binary where an "i" says so.
UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}


def parse_size(text: str) -> int:
    """Bytes of "200GB", "1.5 TB", "64MiB" or "4096".

    Raises UserError if the text is no size, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = UNITS.get((match[2] or "B").upper()) if match else None
    size = int(Fraction(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise UserError(
            f"the size {text!r} is not understood; a positive number with one of B, KB, MB, GB, TB, PB, KiB, MiB, "
            "GiB, TiB, PiB is needed, such as 200GB"
        )
    return size


def show_size(size: int) -> str:
    """`size` bytes in the largest decimal unit of which there is one at least, such as "1.5 GB"."""
    for letter, power in zip("PTGMK", range(5, 0, -1), strict=True):
        if size >= 1000**power:
            return f"{size / 1000**power:.4g} {letter}B"
    return f"{size} B"
