"""A street in perspective, drawn on a canvas."""

import numpy as np

from fcn_dist.data.synthetic import objects as draw
from fcn_dist.data.synthetic.shapes import Camera, Canvas, Floats, Label, Point, mix, vary


def street(canvas: Canvas, rng: np.random.Generator) -> None:
    """A street in perspective: houses on both sides, pavements, lane marks, trees, cars and lamps."""
    camera = canvas.camera(rng, 0.78, 1.7, 0.48)
    haze = draw.sky(canvas, rng, camera.y)
    _skyline(canvas, camera, rng, haze)
    half, pavement = rng.uniform(3.2, 4.6), rng.uniform(1.8, 2.8)
    _ground(canvas, camera, rng, half, pavement)
    things: list[tuple[float, str, float]] = []
    for side in (-1, 1):
        things += _plots(rng, side * (half + pavement))
        things += [(z, "tree", side * (half + 0.7)) for z in rng.uniform(7, 40, rng.integers(1, 5))]
        things += [(z, "lamp", side * (half + 0.4)) for z in rng.uniform(6, 25, rng.integers(0, 2))]
        if rng.random() < 0.75:
            things += [(rng.uniform(7.5, 18), "car", side * (half * rng.uniform(0.4, 0.6)))]
        if rng.random() < 0.6:
            things += [(rng.uniform(9, 24), "car", side * (half - 1.0))]
    # From far to near: what is nearer hides the rest.
    for z, kind, x in sorted(things, reverse=True):
        if kind == "house":
            _house_row(canvas, camera, rng, x, z)
        elif kind == "tree":
            foot = camera.project((x, 0, z))[0]
            draw.leafy_tree(canvas, rng, foot[0], foot[1], camera.scale(z) * rng.uniform(4, 6.5))
        elif kind == "lamp":
            _street_lamp(canvas, camera, x, z)
        else:
            draw.car(canvas, camera, rng, x, z)


def _skyline(canvas: Canvas, camera: Camera, rng: np.random.Generator, haze: Floats) -> None:
    left = -20.0
    while left < canvas.width:
        wide, high = canvas.width * rng.uniform(0.04, 0.1), canvas.height * rng.uniform(0.02, 0.13)
        colour = mix(vary(rng, (128, 124, 130), 10), haze, 0.35).tolist()
        corners = [(left, camera.y - high), (left + wide, camera.y - high)]
        corners += [(left + wide, camera.y + 3), (left, camera.y + 3)]
        canvas.polygon(corners, colour, Label.BUILDING)
        left += wide


def _ground(canvas: Canvas, camera: Camera, rng: np.random.Generator, half: float, pavement: float) -> None:
    def strip(x0: float, x1: float, colour: Floats, label: int | None, z0: float = 1.0, z1: float = 90.0) -> None:
        quad = camera.project((x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1))
        canvas.polygon(quad, colour.tolist(), label)

    lawn, stone, asphalt = vary(rng, (104, 142, 66)), vary(rng, (182, 174, 160)), vary(rng, (92, 93, 98))
    bottom = [(0, camera.y + 1), (canvas.width, camera.y + 1), (canvas.width, canvas.height), (0, canvas.height)]
    canvas.polygon(bottom, lawn.tolist(), Label.GRASS)
    strip(-half - pavement, half + pavement, stone, Label.SIDEWALK)
    for joint in np.arange(2.0, 30.0, 1.5):
        strip(-half - pavement, half + pavement, stone * 0.85, None, joint, joint + 0.06)
    strip(-half - 0.18, half + 0.18, stone * 1.15, Label.SIDEWALK)
    strip(-half, half, asphalt, Label.ROAD)
    for edge in (-half + 0.25, half - 0.35):
        strip(edge, edge + 0.1, asphalt + 70, None)
    start = rng.uniform(0, 5)
    for z in np.arange(1.0 + start, 70.0, 5.0):
        strip(-0.08, 0.08, np.array([226, 224, 214]), None, z, z + 2.6)


def _plots(rng: np.random.Generator, x: float) -> list[tuple[float, str, float]]:
    """Houses along one side as (far end, kind, x); a missing one leaves a lawn with trees."""
    plots: list[tuple[float, str, float]] = []
    z = float(rng.uniform(10, 14))
    while z < 70:
        if rng.random() < 0.82:
            plots.append((z, "house", x))
        else:
            plots.append((z - 4, "tree", x * rng.uniform(1.25, 1.7)))
        z += 9
    return plots


def _house_row(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, far: float) -> None:
    near, height = max(far - 9.0, 1.0), rng.uniform(4.5, 11)
    length = far - near
    outer = x + np.sign(x) * 9
    light = rng.uniform(0.72, 0.8) if x > 0 else rng.uniform(0.92, 1.0)  # the sun stands on the right
    front = draw.facade(rng, length, height)
    end: list[Point] = [(x, height, near), (outer, height, near), (outer, 0, near), (x, 0, near)]
    plain = (front[:, :16].astype(np.float32).mean(axis=(0, 1)) * (1.7 - light) * 0.85).clip(0, 255)
    canvas.polygon(camera.project(*end), plain.tolist(), Label.BUILDING)
    face: list[Point] = [(x, height, near), (x, height, far), (x, 0, far), (x, 0, near)]
    if x > 0:
        face = [face[1], face[0], face[3], face[2]]
    canvas.texture((front * light).astype(np.uint8), camera.project(*face), Label.BUILDING)


def _street_lamp(canvas: Canvas, camera: Camera, x: float, z: float) -> None:
    (_, foot), (x0, y0) = camera.project((x, 0, z), (x, 4.6, z))
    thick, arm = max(camera.scale(z) * 0.09, 1.5), -np.sign(x) * camera.scale(z) * 1.1
    pole = [(x0 - thick, foot), (x0 + thick, foot), (x0 + thick, y0), (x0 - thick, y0)]
    canvas.polygon(pole, (58, 62, 66), Label.OTHER)
    canvas.polygon(
        [(x0, y0), (x0 + arm, y0 - thick), (x0 + arm, y0 + thick), (x0, y0 + 2 * thick)], (58, 62, 66), Label.OTHER
    )
    canvas.disc(x0 + arm, y0 + thick, (thick * 2.2, thick * 1.3), (252, 238, 196), Label.OTHER)
