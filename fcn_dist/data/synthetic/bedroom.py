"""A bedroom in perspective, drawn on a canvas."""

from dataclasses import dataclass

import numpy as np

from fcn_dist.data.synthetic import objects as draw
from fcn_dist.data.synthetic.shapes import Camera, Canvas, Floats, Image, Label, Point, noise, vary


@dataclass(frozen=True)
class _Wall:
    """A wall seen from inside: its lower left corner, the direction in X and Z to its right, and its extent."""

    origin: Point
    direction: tuple[float, float]
    length: float
    height: float

    def area(self, camera: Camera, u0: float, u1: float, v0: float, v1: float) -> Floats:
        """Canvas corners, from top left clockwise, of the part u0..u1 metres along and v0..v1 metres up."""
        (x, _, z), (dx, dz) = self.origin, self.direction
        corners = ((u0, v1), (u1, v1), (u1, v0), (u0, v0))
        return camera.project(*((x + dx * u, v, z + dz * u) for u, v in corners))


def bedroom(canvas: Canvas, rng: np.random.Generator) -> None:
    """A room in perspective: floor, ceiling, three walls with windows and paintings, a bed, lamps."""
    camera = canvas.camera(rng, 0.66, rng.uniform(1.5, 1.75), 0.42)
    left, right = -rng.uniform(1.7, 2.6), rng.uniform(1.7, 2.6)
    near, back, height = 0.8, rng.uniform(4.4, 5.6), rng.uniform(2.5, 2.9)
    canvas.tint = ((1.0, 1.0, 1.0), (1.06, 0.99, 0.88), (0.94, 0.98, 1.05))[rng.integers(3)]
    corners: list[Point] = [(left, 0, back), (right, 0, back), (right, 0, near), (left, 0, near)]
    canvas.texture(_occluded(_floorboards(rng)), camera.project(*corners), Label.FLOOR)
    corners = [(left, height, near), (right, height, near), (right, height, back), (left, height, back)]
    plaster = np.broadcast_to(vary(rng, (224, 222, 216), 5), (64, 64, 3))
    canvas.texture(_occluded(plaster), camera.project(*corners), Label.CEILING)
    walls = (
        _Wall((left, 0, near), (0, 1), back - near, height),
        _Wall((right, 0, back), (0, -1), back - near, height),
        _Wall((left, 0, back), (1, 0), right - left, height),
    )
    paper, skirting = _wallpaper(rng), vary(rng, (224, 220, 212), 3).tolist()
    lights = (rng.uniform(0.8, 0.95), rng.uniform(0.72, 0.88), 1.0)
    kinds = rng.permutation(["window", "painting", rng.choice(["window", "painting"])])
    for wall, light, kind in zip(walls, lights, kinds, strict=True):
        canvas.texture(_occluded(paper * light), wall.area(camera, 0, wall.length, 0, height), Label.WALL)
        canvas.polygon(wall.area(camera, 0, wall.length, 0, 0.1), skirting, Label.WALL)
        _hang(canvas, camera, rng, wall, str(kind))
    _bed(canvas, camera, rng, rng.uniform(left + 1.1, right - 1.1), back)
    if rng.random() < 0.7:
        _ceiling_lamp(canvas, camera, rng, height)


def _wallpaper(rng: np.random.Generator) -> Floats:
    papers = ((206, 196, 174), (176, 190, 196), (200, 178, 164), (182, 192, 166), (214, 204, 196), (168, 160, 178))
    paper = np.broadcast_to(vary(rng, papers[rng.integers(len(papers))], 7), (90, 140, 3)).copy()
    style = rng.integers(3)
    if style == 1:
        paper[:, np.arange(140) % 10 < 5] *= rng.uniform(0.9, 0.96)
    elif style == 2:
        paper[58:] = paper[58:] * 0.25 + np.array([168, 164, 156], np.float32)
        paper[57:59] *= 0.8
    return paper


def _floorboards(rng: np.random.Generator) -> Floats:
    woods = ((150, 104, 66), (120, 80, 52), (172, 132, 92), (104, 76, 60))
    boards = np.broadcast_to(vary(rng, woods[rng.integers(len(woods))], 8), (240, 180, 3)).copy()
    wide = int(rng.integers(7, 12))
    for left in range(0, 180, wide):
        boards[:, left : left + wide] *= rng.normal(1, 0.07)
        joint = int(rng.integers(0, 120))
        boards[joint::120, left : left + wide] *= 0.7
        boards[:, left] *= 0.72
    return boards * (1 + 0.03 * noise(rng, (240, 180), (40, 2)))[..., None]


def _occluded(texture: Floats) -> Image:
    """Darken a surface towards its edges, where less light gets into the corner."""
    rows, columns = texture.shape[:2]
    down, along = (np.minimum(np.arange(n), n - 1 - np.arange(n)) / n for n in (rows, columns))
    corner = (1 - 0.2 * np.exp(-down / 0.06))[:, None] * (1 - 0.2 * np.exp(-along / 0.06))[None]
    shaded: Image = np.clip(texture * corner[..., None], 0, 255).astype(np.uint8)
    return shaded


def _hang(canvas: Canvas, camera: Camera, rng: np.random.Generator, wall: _Wall, kind: str) -> None:
    """Put a window or a painting or two on a wall, on that half of a side wall that is in view."""
    first, last = {0: (0.15, 0.85), 1: (0.5, 0.95), -1: (0.05, 0.5)}[int(wall.direction[1])]
    room = (last - first) * wall.length
    if kind == "window":
        width = min(room, rng.uniform(1.0, 1.7))
        start = first * wall.length + rng.uniform(0, room - width)
        sill = rng.uniform(0.85, 1.0)
        area = (start, start + width, sill, wall.height - rng.uniform(0.3, 0.5))
        canvas.texture(draw.window(rng), wall.area(camera, *area), Label.WINDOW)
        canvas.polygon(
            wall.area(camera, start - 0.08, start + width + 0.08, sill - 0.08, sill), (232, 230, 224), Label.WINDOW
        )
        return
    count = int(rng.integers(1, 3))
    for number in range(count):
        width = min(room / count * 0.85, rng.uniform(0.7, 1.2))
        start = first * wall.length + room / count * number + rng.uniform(0, room / count - width)
        low = rng.uniform(1.25, 1.45)
        area = (start, start + width, low, min(low + width * rng.uniform(0.7, 1.0), wall.height - 0.2))
        canvas.shadow(wall.area(camera, *area) + np.float32(2), 0.35, 2.0)
        canvas.texture(draw.painting(rng), wall.area(camera, *area), Label.PAINTING)


def _bed(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, back: float) -> None:
    half, foot, high = rng.uniform(0.7, 0.95), back - rng.uniform(2.0, 2.2), rng.uniform(0.45, 0.58)
    left, right = x - half, x + half
    wood, linen = vary(rng, (112, 76, 48), 14), vary(rng, (226, 222, 214), 6)
    covers = ((150, 46, 54), (46, 78, 130), (70, 110, 84), (196, 156, 80), (122, 86, 140), (86, 96, 108))
    cover = vary(rng, covers[rng.integers(len(covers))], 10)
    ground = camera.project((left, 0, foot), (right, 0, foot), (right, 0, back), (left, 0, back))
    canvas.shadow(ground, 0.6, 5.0)
    if rng.random() < 0.75:
        _nightstand(canvas, camera, rng, right + 0.3 if x < 0 else left - 0.3, back)
    canvas.box(
        camera,
        ((left - 0.05, right + 0.05), (0, high + rng.uniform(0.35, 0.6)), (back - 0.1, back)),
        wood,
        Label.BED,
    )
    canvas.box(camera, ((left, right), (0, high - 0.2), (foot, back - 0.1)), wood * 0.9, Label.BED)
    canvas.box(camera, ((left, right), (high - 0.25, high), (foot, back - 0.1)), linen, Label.BED)
    for middle in (x - half * 0.48, x + half * 0.48):
        angles = np.linspace(0, 2 * np.pi, 24)
        # A rounded rectangle: a circle pulled towards its corners.
        dx, dz = (np.sign(f(angles)) * np.abs(f(angles)) ** 0.5 for f in (np.cos, np.sin))
        for lift, shade in ((0.02, 0.8), (0.1, 1.08)):
            ring = [(middle + half * 0.4 * u, high + lift, back - 0.42 + 0.24 * w) for u, w in zip(dx, dz, strict=True)]
            canvas.polygon(camera.project(*ring), (linen * shade).clip(0, 255).tolist(), Label.BED)
    fold = back - rng.uniform(0.75, 1.0)
    canvas.box(camera, ((left - 0.03, right + 0.03), (high - 0.32, high + 0.03), (foot - 0.03, fold)), cover, Label.BED)
    top = [
        (left, high + 0.03, fold),
        (right, high + 0.03, fold),
        (right, high + 0.03, fold - 0.2),
        (left, high + 0.03, fold - 0.2),
    ]
    canvas.polygon(camera.project(*top), linen.tolist(), Label.BED)


def _nightstand(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, back: float) -> None:
    wood = vary(rng, (132, 96, 64))
    canvas.box(camera, ((x - 0.22, x + 0.22), (0, 0.5), (back - 0.45, back - 0.02)), wood, Label.OTHER)
    foot, neck = camera.project((x, 0.5, back - 0.2), (x, 0.75, back - 0.2))
    metre = camera.scale(back - 0.2)
    stem = [(foot[0] - 2, foot[1]), (foot[0] + 2, foot[1]), (neck[0] + 2, neck[1]), (neck[0] - 2, neck[1])]
    canvas.polygon(stem, (70, 60, 54), Label.OTHER)
    shade = [(-0.17, 0.0), (0.17, 0.0), (0.11, -0.25), (-0.11, -0.25)]
    canvas.polygon([(neck[0] + u * metre, neck[1] + v * metre) for u, v in shade], (252, 228, 170), Label.OTHER)


def _ceiling_lamp(canvas: Canvas, camera: Camera, rng: np.random.Generator, height: float) -> None:
    z = rng.uniform(2.8, 4.0)
    (x, hook), (_, lamp) = camera.project((0, height, z), (0, height - 0.3, z))
    radius = 0.26 * camera.scale(z)
    canvas.polygon([(x - 1.5, hook), (x + 1.5, hook), (x + 1.5, lamp), (x - 1.5, lamp)], (80, 76, 70), Label.OTHER)
    canvas.disc(x, lamp, (radius, radius * 0.45), (214, 198, 166), Label.OTHER)
    canvas.disc(x, lamp + radius * 0.12, (radius * 0.8, radius * 0.3), (255, 248, 222), Label.OTHER)
