"""Where drawn people stand: a park, a street, a room and other backgrounds, with what belongs there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.drawn.chance import pick
from pipelines.drawn.flat import (
    Color,
    Picture,
    Points,
    add_texture,
    box,
    fill,
    gradient,
    one_of,
    shaded,
    tint,
    trapezium,
)


@dataclass(frozen=True)
class Scene:
    """A background and what follows from it for the people in it."""

    picture: Picture
    """uint8 (h, w, 3) RGB, painted further"""
    horizon: float
    """row in px: where the ground would end"""
    ground: float
    """row where the ground people stand on ends: the foot of a wall, a shore"""
    light: NDArray[np.float32]
    """unit vector to the light: x right, y down, z towards the viewer"""
    ambient: float
    sunny: bool
    indoor: bool


def paint_scene(rng: np.random.Generator, width: int, height: int) -> Scene:
    """A background of one of SCENES."""
    name = pick(rng, tuple(SCENES), [share for share, _ in SCENES.values()])
    indoor = name in INDOOR
    picture = np.empty((height, width, 3), np.uint8)
    horizon = float(height * rng.uniform(0.32, 0.52))
    ground = SCENES[name][1](rng, picture, horizon)
    if rng.random() < 0.35:  # the lens was on the people
        small = cv2.resize(picture, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), rng.uniform(0.5, 1.3))
        large = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
        picture = np.asarray(large, np.uint8)
    light = np.array([rng.uniform(-0.9, 0.9), rng.uniform(-1.0, -0.45), rng.uniform(0.5, 1.0)], np.float32)
    sunny = not indoor and rng.random() < 0.55
    ambient = float(rng.uniform(0.38, 0.5) if sunny else rng.uniform(0.5, 0.66))
    return Scene(picture, horizon, ground, light / np.linalg.norm(light), ambient, sunny, indoor)


def _sky(rng: np.random.Generator, picture: Picture, horizon: float) -> None:
    skies: list[tuple[Color, Color]] = [
        ((86, 140, 206), (190, 214, 236)),
        ((120, 160, 205), (214, 222, 228)),
        ((176, 184, 192), (216, 218, 220)),
        ((96, 104, 150), (240, 190, 150)),
    ]
    above, below = skies[int(rng.choice(4, p=[0.4, 0.28, 0.22, 0.1]))]
    area = picture[: int(horizon) + 2]
    gradient(area, tint(rng, above, 8), tint(rng, below, 8))
    add_texture(rng, area, "cloud", rng.uniform(3, 14))


def _ground(
    rng: np.random.Generator, picture: Picture, horizon: float, color: Color, kind: str, strength: float
) -> None:
    area = picture[int(horizon) :]
    gradient(area, shaded(color, 1.08), shaded(color, 0.86))
    add_texture(rng, area, kind, strength)


def _tree(rng: np.random.Generator, picture: Picture, x: float, foot: float, tall: float) -> None:
    green = one_of(rng, [(58, 96, 48), (76, 112, 54), (42, 80, 52), (110, 116, 50)])
    low, high = 0.04 * tall, 0.02 * tall
    trunk = [(x - low, foot), (x - high, foot - 0.5 * tall), (x + high, foot - 0.5 * tall), (x + low, foot)]
    fill(picture, trunk, tint(rng, (84, 66, 50), 6))
    blobs = rng.normal(0, 1, (11, 2)) * (0.13 * tall, 0.14 * tall) + (x, foot - 0.68 * tall)
    for step, factor in ((0.0, 0.78), (-0.035, 1.0), (-0.08, 1.2)):
        for bx, by in blobs:
            at = round(bx + step * tall * 0.6), round(by + step * tall)
            cv2.circle(picture, at, round(tall * (0.17 + step * 0.8)), shaded(green, factor), -1)


def _hills(rng: np.random.Generator, picture: Picture, horizon: float, color: Color, high: float) -> None:
    width = picture.shape[1]
    x = np.linspace(0, width, 40)
    y = sum(np.sin(x / width * rng.uniform(2, 9) + rng.uniform(0, 6)) * high / (i + 1) for i in range(3))
    y = horizon - high * 0.6 - 0.5 * y
    fill(picture, [(0, horizon + 3), *zip(x, y, strict=True), (width, horizon + 3)], color)


def _park(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    _sky(rng, picture, horizon)
    woods = one_of(rng, [(96, 124, 110), (120, 140, 130), (88, 110, 84)])
    _hills(rng, picture, horizon, woods, horizon * 0.25)
    meadow = one_of(rng, [(106, 142, 70), (128, 150, 84), (150, 146, 96)])
    _ground(rng, picture, horizon, meadow, "grass", 13)
    if rng.random() < 0.4:  # a path
        x, spread = rng.uniform(0.1, 0.9) * width, rng.uniform(0.2, 0.5) * width
        far = rng.uniform(0.3, 0.7) * width
        path = [(far - 4, horizon), (far + 4, horizon), (x + spread, height), (x - spread, height)]
        fill(picture, path, tint(rng, (186, 174, 150), 8))
    for x in rng.uniform(0, width, int(rng.integers(2, 7))):
        foot = horizon + rng.uniform(0, 0.06) * height
        _tree(rng, picture, x, foot, rng.uniform(0.25, 0.75) * horizon + 20)
    return horizon


def _windows(
    rng: np.random.Generator, picture: Picture, x0: float, y0: float, x1: float, y1: float, wall: Color
) -> None:
    step_x, step_y = rng.uniform(22, 44), rng.uniform(30, 52)
    glass = one_of(rng, [(70, 86, 104), (120, 140, 156), (48, 54, 62)])
    for y in np.arange(y0 + 10, y1 - 0.7 * step_y, step_y):
        for x in np.arange(x0 + 8, x1 - 0.6 * step_x, step_x):
            box(picture, x - 2, y - 2, x + 0.55 * step_x + 2, y + 0.6 * step_y + 2, shaded(wall, 1.2))
            box(picture, x, y, x + 0.55 * step_x, y + 0.6 * step_y, shaded(glass, rng.uniform(0.8, 1.3)))


FACADES: list[Color] = [
    (170, 120, 96), (196, 184, 160), (150, 150, 150), (206, 176, 130), (132, 142, 156), (226, 220, 208),
]  # fmt: skip


def _street(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    _sky(rng, picture, horizon)
    base = horizon + 0.05 * height
    pavement = one_of(rng, [(150, 148, 144), (172, 164, 152), (120, 120, 124)])
    _ground(rng, picture, horizon, pavement, "plaster", 6)
    x = -rng.uniform(0, 60)
    while x < width:
        wide, roof = rng.uniform(80, 210), rng.uniform(-0.1, 0.75) * horizon
        wall = one_of(rng, FACADES)
        box(picture, x, roof, x + wide, base, wall)
        _windows(rng, picture, x, roof, x + wide, base - 0.16 * height, wall)
        if rng.random() < 0.6:  # a shop
            glass = one_of(rng, [(56, 60, 66), (140, 160, 170)])
            box(picture, x + 8, base - 0.13 * height, x + wide - 8, base, glass)
            sign = one_of(rng, [(170, 50, 46), (40, 90, 120), (60, 110, 70), (220, 200, 150)])
            box(picture, x + 4, base - 0.15 * height, x + wide - 4, base - 0.11 * height, sign)
        x += wide
    kerb = base + rng.uniform(0.05, 0.14) * height
    if rng.random() < 0.6:
        box(picture, 0, kerb, width, height, tint(rng, (92, 92, 96), 8))
        box(picture, 0, kerb - 3, width, kerb, (196, 194, 188))
        add_texture(rng, picture[int(kerb) :], "plaster", 6)
        lane = kerb + 0.5 * (height - kerb)
        for start in range(-40, width, 130):
            mark: Points = [(start, lane), (start + 70, lane), (start + 62, lane + 8), (start - 10, lane + 8)]
            fill(picture, mark, (214, 212, 204))
    for _ in range(int(rng.integers(0, 3))):
        _car(rng, picture, rng.uniform(0, width), kerb, rng.uniform(0.16, 0.26) * height)
    if rng.random() < 0.4:
        _tree(rng, picture, rng.uniform(0, width), base + 8, rng.uniform(0.6, 1.0) * horizon + 30)
    return base


def _car(rng: np.random.Generator, picture: Picture, x: float, foot: float, tall: float) -> None:
    paint = one_of(rng, [(170, 40, 40), (60, 80, 130), (210, 210, 212), (50, 52, 56), (140, 146, 150)])
    long = 2.6 * tall
    sill = foot - 0.55 * tall
    roof = [(x + 0.32 * long, foot - tall), (x + 0.68 * long, foot - tall)]
    fill(picture, [(x + 0.2 * long, sill), *roof, (x + 0.84 * long, sill)], (66, 82, 96))
    box(picture, x, sill, x + long, foot - 0.15 * tall, paint)
    for wheel in (0.2, 0.8):
        hub = round(x + wheel * long), round(foot - 0.16 * tall)
        for radius, color in ((0.18, (28, 28, 30)), (0.08, (150, 150, 150))):
            cv2.circle(picture, hub, round(radius * tall), color, -1, cv2.LINE_AA)


WALLS: list[Color] = [
    (222, 214, 198), (200, 206, 210), (188, 200, 178), (214, 190, 170), (168, 182, 200), (232, 230, 224),
]  # fmt: skip


def _room(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    floor = horizon + rng.uniform(0.12, 0.26) * height
    wall = one_of(rng, WALLS)
    gradient(picture[: int(floor)], shaded(wall, rng.uniform(0.8, 0.95)), shaded(wall, 1.02))
    add_texture(rng, picture[: int(floor)], "plaster", 3)
    if rng.random() < 0.2:
        for x in np.arange(0, width, rng.uniform(24, 60)):
            box(picture, x, 0, x + 8, floor, shaded(wall, 0.93))
    wood = one_of(rng, [(160, 116, 74), (132, 96, 66), (190, 160, 122), (150, 150, 152), (112, 84, 74)])
    gradient(picture[int(floor) :], shaded(wood, 0.9), shaded(wood, 1.08))
    for x in np.linspace(-2.0 * width, 3.0 * width, 44):  # planks run to one point
        vanish = 0.5 * width
        top = vanish + (x - vanish) * (floor - horizon) / (height - horizon)
        cv2.line(picture, (round(top), round(floor)), (round(x), height), shaded(wood, 0.8), 1, cv2.LINE_AA)
    add_texture(rng, picture[int(floor) :], "plaster", 4)
    box(picture, 0, floor - 9, width, floor, shaded(wall, 1.1))
    for _ in range(int(rng.integers(2, 6))):
        x = rng.uniform(-0.05, 0.95) * width
        [_window, _frame, _door, _shelf, _sofa, _plant][int(rng.integers(6))](rng, picture, x, floor, height)
    return floor


def _window(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wide, tall, top = rng.uniform(70, 150), rng.uniform(0.3, 0.5) * floor, rng.uniform(0.05, 0.2) * floor
    box(picture, x - 6, top - 6, x + wide + 6, top + tall + 6, (238, 236, 230))
    box(picture, x, top, x + wide, top + tall, tint(rng, (196, 216, 232), 12))
    box(picture, x, top + 0.7 * tall, x + wide, top + tall, tint(rng, (130, 152, 110), 14))
    box(picture, x + wide / 2 - 3, top, x + wide / 2 + 3, top + tall, (238, 236, 230))
    if rng.random() < 0.5:
        curtain = one_of(rng, [(170, 70, 70), (90, 110, 150), (200, 190, 160), (80, 120, 100)])
        box(picture, x - 26, top - 14, x + 6, top + 1.2 * tall, curtain)
        box(picture, x + wide - 6, top - 14, x + wide + 26, top + 1.2 * tall, shaded(curtain, 0.9))


def _frame(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wide, tall, top = rng.uniform(40, 100), rng.uniform(40, 90), rng.uniform(0.08, 0.3) * floor
    box(picture, x, top, x + wide, top + tall, one_of(rng, [(60, 46, 36), (30, 30, 30), (190, 160, 90)]))
    inner = picture[
        max(0, round(top + 5)) : round(top + tall - 5), max(0, round(x + 5)) : max(0, round(x + wide - 5))
    ]
    if inner.size:
        gradient(inner, tint(rng, (150, 170, 190), 40), tint(rng, (130, 120, 90), 40))


def _door(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wood = one_of(rng, [(140, 100, 66), (224, 222, 216), (90, 100, 110)])
    wide, tall = 0.2 * height, 0.56 * height
    box(picture, x - 6, floor - tall - 6, x + wide + 6, floor, shaded(wood, 0.8))
    box(picture, x, floor - tall, x + wide, floor, wood)
    for y in (0.12, 0.55):
        upper, lower = floor - tall * (1 - y), floor - tall * (0.66 - y)
        box(picture, x + 12, upper, x + wide - 12, lower, shaded(wood, 0.88))
    knob = round(x + wide - 10), round(floor - 0.46 * tall)
    cv2.circle(picture, knob, 4, (200, 180, 120), -1, cv2.LINE_AA)


BOOKS: list[Color] = [
    (160, 50, 46), (50, 80, 120), (220, 210, 190), (60, 100, 70), (200, 150, 60), (70, 60, 60),
]  # fmt: skip


def _shelf(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wood = one_of(rng, [(120, 84, 56), (210, 206, 198)])
    wide, tall = rng.uniform(80, 150), rng.uniform(0.35, 0.6) * height
    box(picture, x, floor - tall, x + wide, floor, shaded(wood, 0.55))
    rows = 4
    for row in range(rows):
        base = floor - tall * row / rows
        at = x + 5
        while at < x + wide - 10:
            thick = rng.uniform(5, 13)
            book = one_of(rng, BOOKS)
            box(picture, at, base - tall / rows * rng.uniform(0.5, 0.8), at + thick - 1, base - 4, book)
            at += thick
        box(picture, x, base - 4, x + wide, base, wood)
    box(picture, x, floor - tall, x + 4, floor, wood)
    box(picture, x + wide - 4, floor - tall, x + wide, floor, wood)


def _sofa(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    cloth = one_of(rng, [(120, 60, 60), (90, 100, 120), (150, 130, 100), (70, 90, 80), (190, 180, 170)])
    tall, wide, foot = 0.2 * height, 0.5 * height, floor + 0.05 * height
    for x0, x1, up, factor in (
        (0.08, 0.92, 1.0, 0.92),
        (0.1, 0.9, 0.5, 1.08),
        (0, 0.13, 0.68, 1.0),
        (0.87, 1, 0.68, 1.0),
    ):
        box(picture, x + x0 * wide, foot - up * tall, x + x1 * wide, foot, shaded(cloth, factor))
    middle = round(x + 0.5 * wide)
    cv2.line(picture, (middle, round(foot - tall)), (middle, round(foot)), shaded(cloth, 0.7), 2)


def _plant(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    foot, tall = floor + 0.03 * height, rng.uniform(0.2, 0.4) * height
    for angle in rng.normal(-90, 32, 9):
        tip = (
            x + tall * math.cos(math.radians(angle)),
            foot - 0.2 * tall + tall * 0.8 * math.sin(math.radians(angle)),
        )
        middle = round((x + tip[0]) / 2), round((foot - 0.2 * tall + tip[1]) / 2)
        size, green = (round(0.42 * tall), round(0.05 * tall)), one_of(rng, [(50, 100, 56), (80, 126, 66)])
        cv2.ellipse(picture, middle, size, angle, 0, 360, green, -1, cv2.LINE_AA)
    pot = trapezium(x, foot - 0.25 * tall, 0.14 * tall, foot, 0.1 * tall)
    fill(picture, pot, one_of(rng, [(170, 92, 62), (210, 208, 204)]))


def _hall(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    """A sports hall or a court: coloured floor with lines, rows of seats or a wall."""
    height, width = picture.shape[:2]
    floor = horizon + rng.uniform(0.05, 0.15) * height
    wall = one_of(rng, [(90, 100, 130), (60, 66, 76), (190, 186, 176), (130, 90, 80)])
    gradient(picture[: int(floor)], shaded(wall, 0.7), wall)
    if rng.random() < 0.55:
        for y in np.arange(0.35 * floor, floor - 16, 14):
            box(picture, 0, y, width, y + 8, shaded(wall, rng.uniform(0.75, 1.25)))
    band = one_of(rng, [(40, 70, 140), (170, 50, 46), (230, 230, 228), (50, 110, 80)])
    box(picture, 0, floor - 22, width, floor, band)
    court = one_of(rng, [(188, 134, 82), (62, 118, 92), (60, 96, 150), (170, 84, 62), (206, 170, 120)])
    _ground(rng, picture, floor, court, "plaster", 4)
    line = one_of(rng, [(240, 240, 236), (240, 240, 236), (230, 200, 80)])
    for _ in range(int(rng.integers(2, 5))):
        y, x = rng.uniform(floor + 5, height), rng.uniform(0, width)
        cv2.line(picture, (0, round(y)), (width, round(y + rng.normal(0, 12))), line, 3, cv2.LINE_AA)
        near = round(x + 2 * (x - width / 2)), height
        cv2.line(picture, (round(x), int(floor)), near, line, 3, cv2.LINE_AA)
    return floor


def _beach(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    _sky(rng, picture, horizon)
    shore = horizon + rng.uniform(0.06, 0.2) * height
    _ground(rng, picture, shore, one_of(rng, [(222, 200, 160), (206, 186, 150)]), "plaster", 6)
    sea = picture[int(horizon) : int(shore)]
    gradient(sea, tint(rng, (50, 104, 146), 10), tint(rng, (110, 170, 180), 10))
    add_texture(rng, sea, "plaster", 7)
    for y in np.linspace(horizon + 6, shore, 5):
        x = np.arange(0, width + 20, 20)
        wave = np.rint(np.stack([x, y + 2 * np.sin(x / 30 + y)], axis=1)).astype(np.int32)
        cv2.polylines(picture, [wave], False, (226, 236, 238), 3 if y > shore - 2 else 1, cv2.LINE_AA)
    return shore


def _snow(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    width = picture.shape[1]
    _sky(rng, picture, horizon)
    for high, color in ((0.8, (150, 164, 186)), (0.45, (196, 206, 220))):
        x = np.linspace(0, width, 12)
        y = horizon - horizon * high * rng.uniform(0.2, 1, 12)
        fill(picture, [(0, horizon + 2), *zip(x, y, strict=True), (width, horizon + 2)], tint(rng, color, 8))
    _ground(rng, picture, horizon, tint(rng, (232, 236, 242), 5), "plaster", 4)
    for x in rng.uniform(0, width, int(rng.integers(0, 8))):  # firs
        tall, foot = rng.uniform(30, 110), horizon + rng.uniform(0, 14)
        for level in range(3):
            low, half = foot - tall * (0.15 + 0.25 * level), tall * (0.24 - 0.06 * level)
            fir = [(x - half, low), (x + half, low), (x, low - 0.42 * tall)]
            fill(picture, fir, tint(rng, (44, 74, 62), 6))
    return horizon


def _studio(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    """Soft spots of colour, far out of focus."""
    height, width = picture.shape[:2]
    small = np.empty((height // 8, width // 8, 3), np.uint8)
    gradient(small, tint(rng, (120, 120, 120), 45), tint(rng, (120, 116, 110), 45))
    for _ in range(int(rng.integers(6, 22))):
        at = (int(rng.integers(small.shape[1])), int(rng.integers(int(small.shape[0] * 0.7))))
        cv2.circle(small, at, int(rng.integers(2, 9)), tint(rng, (140, 130, 120), 60), -1)
    small = cv2.GaussianBlur(small, (0, 0), rng.uniform(1.0, 3.0))
    cv2.resize(small, (width, height), dst=picture, interpolation=cv2.INTER_CUBIC)
    return horizon


SCENES: dict[str, tuple[float, Callable[[np.random.Generator, Picture, float], float]]] = {
    "park": (0.22, _park),
    "street": (0.22, _street),
    "room": (0.24, _room),
    "hall": (0.11, _hall),
    "beach": (0.08, _beach),
    "snow": (0.06, _snow),
    "studio": (0.07, _studio),
}
"""Share of pictures and painter by name; a painter returns Scene.ground."""
INDOOR = ("room", "hall", "studio")
