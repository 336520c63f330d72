"""A valley with mountains, drawn on a canvas."""

import cv2
import numpy as np

from fcn_dist.data.synthetic import objects as draw
from fcn_dist.data.synthetic.shapes import Canvas, Floats, Label, mix, noise, vary


def valley(canvas: Canvas, rng: np.random.Generator) -> None:
    """A landscape: mountains in layers, a lake that mirrors them or a meadow with a road, trees, boulders."""
    horizon = canvas.height * rng.uniform(0.46, 0.6)
    haze = draw.sky(canvas, rng, horizon)
    layers = int(rng.integers(2, 4))
    for layer in range(layers):
        _mountains(canvas, rng, horizon, haze, (layer + 1) / layers)
    meadow = [(0, horizon), (canvas.width, horizon), (canvas.width, canvas.height), (0, canvas.height)]
    lawn = vary(rng, ((98, 132, 62), (126, 142, 72), (84, 124, 60))[rng.integers(3)])
    canvas.polygon(meadow, lawn.tolist(), Label.GRASS)
    _forest(canvas, rng, horizon)
    shore = horizon + (canvas.height - horizon) * rng.uniform(0.35, 0.7)
    lake = rng.random() < 0.65
    if lake:
        _lake(canvas, rng, int(horizon) + 2)
    edge = _foreground(canvas, rng, shore if lake else horizon, lawn)
    if not lake:
        _track(canvas, rng, horizon)
    if rng.random() < 0.45:
        _cottage(canvas, rng, edge)
    stand = edge.clip(shore, None)  # trees of this size do not stand on the far side of a meadow
    for depth in np.sort(rng.uniform(0.08, 0.9, rng.integers(1, 9))):
        x = rng.uniform(0, canvas.width)
        ground = stand[int(x)] + (canvas.height - stand[int(x)]) * depth
        kind = rng.choice(["conifer", "leafy", "boulder"])
        if kind == "boulder":
            _boulder(canvas, rng, x, ground)
        else:
            grow = draw.conifer if kind == "conifer" else draw.leafy_tree
            grow(canvas, rng, x, ground, canvas.height * (0.2 + 0.3 * depth))


def _mountains(canvas: Canvas, rng: np.random.Generator, horizon: float, haze: Floats, nearness: float) -> None:
    shape = (int(horizon) + 2, canvas.width)
    ridge = noise(rng, (1, canvas.width), canvas.width * 0.22, octaves=5)[0]
    peak = canvas.height * (0.42 - 0.22 * nearness)
    crest = horizon - peak - ridge * canvas.height * (0.1 - 0.03 * nearness)
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    relief = noise(rng, shape, (canvas.height * 0.3, canvas.width * 0.1), octaves=4)
    light = 1 + 0.2 * np.clip(np.diff(relief, axis=1, prepend=relief[:, :1]) * canvas.width / 30, -1.4, 1.4)
    rock = mix(vary(rng, (112, 104, 100)), vary(rng, (78, 92, 66)), nearness * 0.8)
    colours = light[..., None] * rock
    if rng.random() < 0.6 and nearness < 0.8:
        snow = (y - crest + relief * canvas.height * 0.02) < canvas.height * 0.1
        colours[snow] = np.array([236, 240, 246], np.float32) * (0.55 + 0.45 * light[snow][:, None])
    depth = 0.55 * (1 - nearness) + 0.25 * np.clip((y - crest) / peak, 0, 1)[..., None]
    canvas.paint(y >= crest, colours * (1 - depth) + haze * (0.92 * depth), Label.MOUNTAIN)


def _forest(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    height = canvas.height * rng.uniform(0.05, 0.1)
    start, end = np.sort(rng.uniform(-0.2, 1.2, 2)) * canvas.width
    for x in np.arange(start, end, height * 0.3):
        draw.conifer(canvas, rng, x, horizon + rng.uniform(1, 4), height * rng.uniform(0.6, 1.2))


def _lake(canvas: Canvas, rng: np.random.Generator, top: int) -> None:
    """Fill the canvas from row `top` with water that mirrors what stands above it."""
    y, x = np.mgrid[top : canvas.height, 0 : canvas.width].astype(np.float32)
    ripples = noise(rng, (len(y), canvas.width), (2.5, canvas.width / 7), octaves=2)
    depth = (y - top) / (canvas.height - top)
    rows = 2 * top - y - 1 + ripples * 2.5 * depth
    mirrored = cv2.remap(canvas.image, x + ripples * 2, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    water = vary(rng, (56, 98, 122))
    share = 0.35 + 0.35 * depth[..., None]
    colours = mirrored * (0.9 * (1 - share)) + water * share + (ripples * (3 + 7 * depth))[..., None]
    canvas.paint(np.ones(y.shape, bool), colours, Label.WATER, top)


def _foreground(canvas: Canvas, rng: np.random.Generator, shore: float, lawn: Floats) -> Floats:
    """A meadow from about `shore` downwards; returns where it begins in each column."""
    wave = noise(rng, (1, canvas.width), canvas.width * 0.4, octaves=3)[0]
    edge: Floats = (shore + wave * canvas.height * 0.035).astype(np.float32)
    top = int(edge.min().clip(0, canvas.height - 1))
    y = np.arange(top, canvas.height, dtype=np.float32)[:, None]
    shape = (len(y), canvas.width)
    depth = np.clip((y - edge) / (canvas.height - shore), 0, 1).astype(np.float32)
    blades = noise(rng, shape, (5, 1.5)) * 9 * depth
    colours = lawn * (1.12 - 0.42 * depth)[..., None] + blades[..., None]
    flowers = (noise(rng, shape, 1.5) > 2.4) & (depth > 0.25)
    colours[flowers] = vary(rng, (232, 206, 92), 30)
    canvas.paint(y >= edge, colours, Label.GRASS, top)
    return edge


def _track(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    """A winding asphalt road from the viewer's feet to the horizon."""
    t = np.linspace(0.015, 1, 40)
    phase, bend = rng.uniform(0, 6), rng.uniform(0.05, 0.16)
    middle = canvas.width * (rng.uniform(0.3, 0.7) + bend * np.sin(phase + 4 / (t + 0.35)) * (0.3 + t))
    y, half = horizon + 3 + (canvas.height + 2 - horizon) * t, canvas.width * 0.17 * t
    asphalt = vary(rng, (104, 103, 106))
    for width, colour, label in (
        (1.12, asphalt + 36, None),
        (1.0, asphalt, Label.ROAD),
        (0.035, asphalt + 100, None),
    ):
        left, right = np.stack([middle - half * width, y], 1), np.stack([middle + half * width, y], 1)
        canvas.polygon(np.concatenate([left, right[::-1]]), colour.tolist(), label)


def _cottage(canvas: Canvas, rng: np.random.Generator, edge: Floats) -> None:
    wide, x = canvas.width * rng.uniform(0.12, 0.22), canvas.width * rng.uniform(0.05, 0.75)
    ground = edge[int(x) : int(x + wide)].max() + canvas.height * 0.03
    high = wide * rng.uniform(0.45, 0.6)
    front = draw.facade(rng, 6, 3.4)
    corners = [(x, ground - high), (x + wide, ground - high), (x + wide, ground), (x, ground)]
    canvas.texture(front, np.array(corners, np.float32), Label.BUILDING)
    eaves, ridge = wide * 0.06, ground - high * 1.75
    roof = [
        (x - eaves, ground - high * 0.96),
        (x + wide + eaves, ground - high * 0.96),
        (x + wide * 0.85, ridge),
        (x + wide * 0.15, ridge),
    ]
    canvas.polygon(roof, vary(rng, (138, 66, 50)).tolist(), Label.BUILDING)
    chimney = [
        (x + wide * 0.66, ridge + 4),
        (x + wide * 0.75, ridge + 4),
        (x + wide * 0.75, ridge - wide * 0.12),
        (x + wide * 0.66, ridge - wide * 0.12),
    ]
    canvas.polygon(chimney, (112, 66, 54), Label.BUILDING)


def _boulder(canvas: Canvas, rng: np.random.Generator, x: float, ground: float) -> None:
    size = canvas.height * rng.uniform(0.025, 0.06)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    outline = np.stack([np.cos(angles) * 1.4, np.sin(angles) * 0.8], 1) * rng.uniform(0.8, 1.1, (9, 1)) * size
    stone = vary(rng, (126, 122, 116))
    canvas.polygon(outline + np.array((x, ground)), (stone * 0.75).tolist(), Label.OTHER)
    canvas.polygon(outline * 0.75 + np.array((x, ground)) - size * 0.2, stone.tolist(), Label.OTHER)
