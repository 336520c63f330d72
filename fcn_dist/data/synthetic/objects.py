"""What stands in synthetic scenes: skies, trees, cars, facades, windows and paintings, drawn on a canvas."""

import cv2
import numpy as np

from fcn_dist.data.synthetic.shapes import Camera, Canvas, Colour, Floats, Image, Label, mix, noise, vary

# Zenith, horizon, and the light that such a sky throws on the rest.
_SKIES: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((62, 116, 198), (188, 216, 242), (1.04, 1.02, 0.97)),
    ((88, 140, 205), (214, 228, 240), (1.0, 1.0, 0.98)),
    ((104, 118, 178), (252, 208, 160), (1.08, 0.95, 0.82)),
    ((142, 154, 170), (208, 213, 218), (0.88, 0.91, 0.95)),
    ((86, 88, 150), (238, 178, 168), (0.92, 0.85, 0.92)),
)
_LEAVES = ((58, 98, 40), (82, 118, 44), (48, 84, 46), (104, 122, 50))
_FACADES = ((158, 92, 74), (196, 172, 140), (172, 128, 98), (186, 182, 174), (140, 104, 92), (208, 190, 150))
_CAR_PAINT = ((176, 30, 34), (34, 62, 140), (228, 228, 230), (38, 40, 46), (206, 160, 30), (40, 110, 92))


def sky(canvas: Canvas, rng: np.random.Generator, horizon: float) -> Floats:
    """Fill the canvas down to the horizon and set the scene's light; returns the colour at the horizon."""
    zenith, low, canvas.tint = _SKIES[rng.integers(len(_SKIES))]
    zenith_colour, low_colour = vary(rng, zenith, 8), vary(rng, low, 4)
    height = np.linspace(0, 1, int(horizon) + 2, dtype=np.float32)[:, None, None]
    colours = zenith_colour * (1 - height) + low_colour * height
    clouds = noise(rng, (len(height), canvas.width), (canvas.height / 5, canvas.width / 3), octaves=4)
    cover = np.clip((clouds - rng.uniform(0.2, 1.3)) * 0.9, 0, 0.85)[..., None]
    colours = colours * (1 - cover) + (low_colour * 0.3 + 178) * cover
    canvas.paint(np.ones(clouds.shape, bool), colours, Label.SKY)
    return low_colour


def leafy_tree(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    """A trunk and a crown of leaf clumps, lit from above; `size` is its height in pixels."""
    trunk, radius = size * 0.05, size * rng.uniform(0.27, 0.36)
    top = ground - size + radius
    canvas.polygon(
        [(x - trunk, ground), (x + trunk, ground), (x + trunk * 0.6, top), (x - trunk * 0.6, top)],
        vary(rng, (86, 66, 50)).tolist(),
        Label.TREE,
    )
    base = vary(rng, _LEAVES[rng.integers(len(_LEAVES))], 8)
    canvas.disc(x, top, (radius * 0.8, radius * 0.75), (base * 0.85).tolist(), Label.TREE)
    count = int(np.clip(size / 5, 12, 46))
    angles, distances = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0, 1, count)) * radius
    positions = np.stack([np.cos(angles) * distances, np.sin(angles) * distances * 1.05], axis=1)
    # Low clumps first: the light ones on top of the crown lie over them.
    for dx, dy in positions[np.argsort(-positions[:, 1])]:
        light = 0.95 - 0.35 * dy / radius - 0.12 * dx / radius + rng.normal(0, 0.05)
        clump = radius * rng.uniform(0.24, 0.42)
        canvas.disc(x + dx, top + dy, (clump, clump), (base * light).clip(0, 255).tolist(), Label.TREE)


def conifer(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    """A fir: tiers of branches, the right half in the shade."""
    base = vary(rng, (44, 80, 52), 8)
    canvas.polygon(
        [(x - size * 0.03, ground), (x + size * 0.03, ground), (x, ground - size * 0.3)],
        (70, 54, 42),
        Label.TREE,
    )
    spread = size * rng.uniform(0.19, 0.25)
    for tier in range(5):
        low = ground - size * (0.1 + 0.17 * tier)
        peak = max(low - size * 0.34, ground - size)
        half = spread * (1 - tier * 0.19)
        light = 0.85 + 0.09 * tier
        canvas.polygon([(x - half, low), (x + half, low), (x, peak)], (base * light).tolist(), Label.TREE)
        canvas.polygon([(x, low - half * 0.15), (x + half, low), (x, peak)], (base * light * 0.78).tolist(), Label.TREE)


def facade(rng: np.random.Generator, length: float, height: float) -> Image:
    """The front of a house, 14 pixels a metre: masonry, rows of windows, a ground floor, a cornice."""
    rows, columns = int(height * 14), max(int(length * 14), 30)
    base = vary(rng, _FACADES[rng.integers(len(_FACADES))], 10)
    wall = np.broadcast_to(base, (rows, columns, 3)).copy()
    if rng.random() < 0.6:
        bricks = rng.normal(1, 0.06, (rows // 3 + 1, columns // 6 + 1)).astype(np.float32)
        wall *= cv2.resize(bricks, (columns, rows), interpolation=cv2.INTER_NEAREST)[..., None]
        wall[::3] *= 0.9
    trim, glass = mix(base, (245, 240, 230), 0.6), vary(rng, (62, 78, 98), 10)
    floor, cell, wide, high = 42, int(rng.integers(28, 40)), int(rng.integers(13, 19)), int(rng.integers(19, 25))
    for bottom in range(rows - 10, high, -floor):
        for left in range((columns % cell + cell - wide) // 2, columns - wide, cell):
            window = wall[bottom - high : bottom, left : left + wide]
            window[:] = trim
            lit = (236, 206, 140) if rng.random() < 0.06 else glass * rng.uniform(0.75, 1.25)
            window[2:-2, 2:-2] = lit
            window[2 : 2 + high // 3, 2:-2] = np.asarray(lit) * 0.75 + 40  # the sky in the upper panes
            window[:, wide // 2] = trim
            wall[bottom : bottom + 2, left - 1 : left + wide + 1] = trim * 0.8
    if rng.random() < 0.7:
        wall[-floor:] *= 0.82
        wall[-floor : -floor + 2] = trim
    wall[:6] = trim * 0.9
    wall[6:9] = base * 0.6
    front: Image = np.clip(wall, 0, 255).astype(np.uint8)
    return front


def window(rng: np.random.Generator) -> Image:
    """A window seen from inside: a white frame with bars, sky and greenery behind."""
    pane = np.linspace(0, 1, 96, dtype=np.float32)[:, None, None]
    view = mix((168, 206, 244), vary(rng, (196, 222, 246), 8), 0.5) * (1 - pane) + 244 * pane
    view = np.repeat(view, 80, axis=1)
    edge = (62 + noise(rng, (1, 80), 14, octaves=2)[0] * 5).astype(int)
    view[np.arange(96)[:, None] > edge] = vary(rng, (122, 156, 100), 10)
    frame = vary(rng, (240, 238, 232), 5)
    bars = int(rng.integers(1, 3))
    for position in range(1, bars + 1):
        middle = 80 * position // (bars + 1)
        view[:, middle - 2 : middle + 2] = frame
    view[40:44] = frame
    for width, shade in ((7, 1.0), (2, 0.75)):
        view[:width] = view[-width:] = frame * shade
        view[:, :width] = view[:, -width:] = frame * shade
    seen: Image = np.clip(view, 0, 255).astype(np.uint8)
    return seen


def painting(rng: np.random.Generator) -> Image:
    """A framed picture: hills under a coloured sky, or coloured shapes."""
    art: Image = np.empty((64, 80, 3), np.uint8)
    hues = rng.permutation([(196, 62, 48), (228, 164, 44), (38, 88, 136), (232, 216, 180), (60, 122, 96)])
    art[:] = hues[0]
    for hue in hues[1:]:
        if rng.random() < 0.5:
            points = np.concatenate([rng.integers(0, 80, (4, 1)), rng.integers(0, 64, (4, 1))], axis=1)
            cv2.fillConvexPoly(art, cv2.convexHull(points.astype(np.int32)), hue.tolist())
        else:
            centre = (int(rng.integers(10, 70)), int(rng.integers(8, 56)))
            cv2.circle(art, centre, int(rng.integers(7, 20)), hue.tolist(), -1)
    frame = vary(rng, ((70, 44, 26), (36, 32, 32), (168, 128, 58))[rng.integers(3)], 5)
    framed: Image = cv2.copyMakeBorder(art, 7, 7, 7, 7, cv2.BORDER_CONSTANT, value=frame.tolist())
    return framed


def car(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float) -> None:
    """A car seen from behind, its middle at (x, z): body, cabin with dark glass, wheels, tail lights."""
    paint = vary(rng, _CAR_PAINT[rng.integers(len(_CAR_PAINT))], 8)
    left, right, near, far = x - 0.9, x + 0.9, z - 2.1, z + 2.1
    ground = camera.project((left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far))
    canvas.shadow(ground, 0.75, 0.12 * camera.scale(z))
    for wheel_x in (left + 0.12, right - 0.12):
        canvas.box(
            camera, ((wheel_x - 0.12, wheel_x + 0.12), (0, 0.5), (near + 0.1, near + 0.7)), (26, 26, 28), Label.CAR
        )
    canvas.box(camera, ((left, right), (0.26, 0.88), (near, far)), paint, Label.CAR)
    side = left if left > 0 else right if right < 0 else None
    if side is not None:
        for middle in (near + 0.8, far - 0.8):
            angles = np.linspace(0, 2 * np.pi, 14)
            ring = [(side, 0.33 + 0.33 * np.sin(a), middle + 0.33 * np.cos(a)) for a in angles]
            canvas.polygon(camera.project(*ring), (26, 26, 28), Label.CAR)
    canvas.box(camera, ((left + 0.14, right - 0.14), (0.88, 1.42), (near + 0.5, far - 1.2)), paint, Label.CAR)
    glass = (left + 0.26, right - 0.26, 0.93, 1.34, near + 0.49)
    _plate(canvas, camera, glass, (58, 70, 84))
    if side is not None:
        inner = side + (0.13 if side > 0 else -0.13)
        quad = [
            (inner, y, d) for y, d in ((0.93, near + 0.75), (0.93, far - 1.4), (1.34, far - 1.4), (1.34, near + 0.75))
        ]
        canvas.polygon(camera.project(*quad), (48, 58, 70), Label.CAR)
    for light in (left + 0.05, right - 0.3):
        _plate(canvas, camera, (light, light + 0.25, 0.58, 0.76, near), (224, 54, 40))
    _plate(canvas, camera, (x - 0.25, x + 0.25, 0.42, 0.56, near), (226, 224, 206))
    _plate(canvas, camera, (left, right, 0.24, 0.34, near), (52, 52, 56))


def _plate(canvas: Canvas, camera: Camera, area: tuple[float, float, float, float, float], colour: Colour) -> None:
    x0, x1, y0, y1, z = area
    quad = camera.project((x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z))
    canvas.polygon(quad, colour, Label.CAR)
