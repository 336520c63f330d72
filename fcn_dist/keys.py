"""Keyed randomness: every draw is a pure function of integers such as (seed, position), never of history."""

from enum import IntEnum

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood 2014)


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    ORDER = 1
    CROP = 2
    PHOTOMETRIC = 3
    DROPOUT = 4
    WEIGHTS = 5
    BLOCKS = 6
    REPLACEMENT = 7


def mix64(value: int) -> int:
    """splitmix64's finaliser: a bijection of 64-bit integers that spreads every input bit."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key64(*parts: int) -> int:
    """One 64-bit key from any number of integers; their order matters."""
    key = 0
    for part in parts:
        key = mix64(key + _GOLDEN + mix64(part + _GOLDEN))
    return key
