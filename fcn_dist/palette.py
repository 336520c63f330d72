"""Colours for classes that bring none of their own."""

import colorsys
from itertools import count

GOLDEN_RATIO = 0.618033988749895
# Neighbours in the list differ in lightness and saturation too, since hues alone run out after a dozen classes.
_LIGHTNESS = (0.50, 0.72, 0.36, 0.60)
_SATURATION = (0.85, 0.60, 0.75)


def palette(num_colours: int) -> tuple[tuple[int, int, int], ...]:
    """`num_colours` distinct RGB colours (0-255), the same on every call; none is black, which means "other".

    Hues step by the golden ratio, so that any run of neighbours is spread over the whole circle.
    """
    colours: dict[tuple[int, int, int], None] = {}
    for i in count():
        if len(colours) == num_colours:
            break
        lightness, saturation = _LIGHTNESS[i % len(_LIGHTNESS)], _SATURATION[i % len(_SATURATION)]
        red, green, blue = colorsys.hls_to_rgb((i * GOLDEN_RATIO) % 1.0, lightness, saturation)
        colours[round(red * 255), round(green * 255), round(blue * 255)] = None
    return tuple(colours)
