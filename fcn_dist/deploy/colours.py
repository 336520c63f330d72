"""Colours of classes in, the same out, but where two could not be told apart.

RGB uint8. Distances are those of CIE L*a*b*, where equal ones look about equally far (CIE 1976); side by side, 2.3 is
just noticed. The benchmark's table has 28 pairs of classes that are nearer than 2, one of them equal.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

APART = 5.0  # at least; an overlay mixes colours with an image, which brings them nearer
SRGB = np.array([(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)])  # to X, Y and Z
LEVELS = range(30, 256, 25)  # of red, green and blue, from which others are taken


def distinct(colours: Sequence[Colour]) -> tuple[Colour, ...]:
    """The same colours, but where a class has one that is hardly told from an earlier class's: the benchmark sorts its
    classes, so that is the rarer one. It has one instead that is as far from all the others, and from black, as there
    are any.
    """
    result, shades = list(colours), _lab(colours)
    candidates = np.array([(red, green, blue) for red in LEVELS for green in LEVELS for blue in LEVELS], np.uint8)
    possible = _lab(candidates)
    apart = _distances(possible, _lab([*colours, (0, 0, 0)]))
    for index in range(1, len(colours)):
        if _distances(shades[index : index + 1], shades[:index]).min() < APART:
            apart[:, index] = np.inf
            best = apart.min(axis=1).argmax()
            red, green, blue = candidates[best]
            result[index], shades[index] = (int(red), int(green), int(blue)), possible[best]
            apart[:, index] = _distances(possible, possible[best : best + 1])[:, 0]
    return tuple(result)


def _lab(colours: Sequence[Colour] | NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, 3), by the definitions of sRGB and of CIE; OpenCV's own takes 0.4 s for its first."""
    values = np.array(colours, np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    shares = linear @ (SRGB / SRGB.sum(axis=1, keepdims=True)).T  # of white
    x, y, z = np.where(shares > (6 / 29) ** 3, np.cbrt(shares), shares * (29 / 6) ** 2 / 3 + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _distances(some: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(some[:, None] - others, axis=2))
