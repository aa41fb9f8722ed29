"""Where drawn people stand: backgrounds, furniture, things in front. Parts of picture.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.drawn.body import pick

Picture = NDArray[np.uint8]
Color = tuple[float, float, float]


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
    indoor = name in ("room", "hall", "studio")
    picture = np.empty((height, width, 3), np.uint8)
    horizon = float(height * rng.uniform(0.32, 0.52))
    ground = SCENES[name][1](rng, picture, horizon)
    if rng.random() < 0.35:  # the lens was on the people
        small = cv2.resize(picture, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), rng.uniform(0.5, 1.3))
        picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    light = np.array([rng.uniform(-0.9, 0.9), rng.uniform(-1.0, -0.45), rng.uniform(0.5, 1.0)], np.float32)
    sunny = not indoor and rng.random() < 0.55
    ambient = float(rng.uniform(0.38, 0.5) if sunny else rng.uniform(0.5, 0.66))
    return Scene(picture, horizon, ground, light / np.linalg.norm(light), ambient, sunny, indoor)


@functools.cache
def texture(name: str) -> Picture:
    """uint8 (720, 720, 3): 128 and noise of standard deviation 16: grain, grass, cloud or plaster."""
    rng = np.random.default_rng(7)
    size = 720
    if name == "grain":
        noise = rng.normal(0, 1, (size, size, 3)).astype(np.float32)
    elif name == "grass":
        noise = cv2.GaussianBlur(rng.normal(0, 1, (size, size)).astype(np.float32), (0, 0), 0.8, sigmaY=2.2)
        noise = noise / noise.std() + 0.8 * _smooth(rng, size, 12)
    elif name == "cloud":
        noise = _smooth(rng, size, 45) + 0.6 * _smooth(rng, size, 18)
    else:
        noise = 0.5 * _smooth(rng, size, 1) + 0.8 * _smooth(rng, size, 6) + 0.8 * _smooth(rng, size, 30)
    if noise.ndim == 2:
        noise = np.repeat(noise[..., None], 3, axis=2)
    return np.clip(np.rint(noise * (16 / noise.std()) + 128), 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, size: int, sigma: float) -> NDArray[np.float32]:
    small = max(1, int(sigma // 3))
    noise = rng.normal(0, 1, (size // small, size // small)).astype(np.float32)
    noise = cv2.resize(cv2.GaussianBlur(noise, (0, 0), sigma / small), (size, size))
    return noise / noise.std()


def add_texture(rng: np.random.Generator, area: Picture, name: str, strength: float) -> None:
    """Add `strength` grey levels (standard deviation) of a texture to a part of a picture, in place."""
    height, width = area.shape[:2]
    if height == 0 or width == 0:
        return
    y, x = int(rng.random() * (720 - height)), int(rng.random() * (720 - width))
    tile = texture(name)[y : y + height, x : x + width]
    area[:] = cv2.addWeighted(area, 1.0, tile, strength / 16, -8 * strength)


def _gradient(area: Picture, above: Color, below: Color) -> None:
    ramp = np.linspace(0, 1, max(1, area.shape[0]), dtype=np.float32)[:, None]
    column = np.array(above, np.float32) * (1 - ramp) + np.array(below, np.float32) * ramp
    area[:, 0] = np.clip(column, 0, 255).astype(np.uint8)
    done, width = 1, area.shape[1]
    while done < width:  # doubling: many times faster than repeating one pixel of three bytes
        more = min(done, width - done)
        area[:, done : done + more] = area[:, :more]
        done += more


def _tint(rng: np.random.Generator, color: Color, spread: float = 14) -> Color:
    r, g, b = (rng.standard_normal(3) * spread + rng.standard_normal() * (0.5 * spread)).tolist()
    return (_level(color[0] + r), _level(color[1] + g), _level(color[2] + b))


def _level(value: float) -> float:
    return min(max(value, 0.0), 255.0)


def _pick(rng: np.random.Generator, colors: list[Color]) -> Color:
    return _tint(rng, colors[int(rng.integers(len(colors)))])


def _shaded(color: Color, factor: float) -> Color:
    return (min(255, color[0] * factor), min(255, color[1] * factor), min(255, color[2] * factor))


def _fill(picture: Picture, points: list[tuple[float, float]], color: Color) -> None:
    fixed = np.rint(np.array(points) * 16).astype(np.int32)
    cv2.fillPoly(picture, [fixed], color, cv2.LINE_AA, 4)


def _box(picture: Picture, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
    cv2.rectangle(picture, (round(x0), round(y0)), (round(x1), round(y1)), color, -1)


# ---------------------------------------------------------------------------------------------------


def _sky(rng: np.random.Generator, picture: Picture, horizon: float) -> None:
    skies: list[tuple[Color, Color]] = [
        ((86, 140, 206), (190, 214, 236)),
        ((120, 160, 205), (214, 222, 228)),
        ((176, 184, 192), (216, 218, 220)),
        ((96, 104, 150), (240, 190, 150)),
    ]
    above, below = skies[int(rng.choice(4, p=[0.4, 0.28, 0.22, 0.1]))]
    area = picture[: int(horizon) + 2]
    _gradient(area, _tint(rng, above, 8), _tint(rng, below, 8))
    add_texture(rng, area, "cloud", rng.uniform(3, 14))


def _ground(
    rng: np.random.Generator, picture: Picture, horizon: float, color: Color, kind: str, strength: float
) -> None:
    area = picture[int(horizon) :]
    _gradient(area, _shaded(color, 1.08), _shaded(color, 0.86))
    add_texture(rng, area, kind, strength)


def _tree(rng: np.random.Generator, picture: Picture, x: float, foot: float, tall: float) -> None:
    green = _pick(rng, [(58, 96, 48), (76, 112, 54), (42, 80, 52), (110, 116, 50)])
    low, high = 0.04 * tall, 0.02 * tall
    trunk = [(x - low, foot), (x - high, foot - 0.5 * tall), (x + high, foot - 0.5 * tall), (x + low, foot)]
    _fill(picture, trunk, _tint(rng, (84, 66, 50), 6))
    blobs = rng.normal(0, 1, (11, 2)) * (0.13 * tall, 0.14 * tall) + (x, foot - 0.68 * tall)
    for step, factor in ((0.0, 0.78), (-0.035, 1.0), (-0.08, 1.2)):
        for bx, by in blobs:
            radius = tall * (0.17 + step * 0.8)
            cv2.circle(
                picture,
                (round(bx + step * tall * 0.6), round(by + step * tall)),
                round(radius),
                _shaded(green, factor),
                -1,
            )


def _hills(rng: np.random.Generator, picture: Picture, horizon: float, color: Color, high: float) -> None:
    width = picture.shape[1]
    x = np.linspace(0, width, 40)
    y = sum(np.sin(x / width * rng.uniform(2, 9) + rng.uniform(0, 6)) * high / (i + 1) for i in range(3))
    y = horizon - high * 0.6 - 0.5 * y
    _fill(picture, [(0, horizon + 3), *zip(x, y, strict=True), (width, horizon + 3)], color)


def _park(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    _sky(rng, picture, horizon)
    _hills(
        rng, picture, horizon, _pick(rng, [(96, 124, 110), (120, 140, 130), (88, 110, 84)]), horizon * 0.25
    )
    _ground(rng, picture, horizon, _pick(rng, [(106, 142, 70), (128, 150, 84), (150, 146, 96)]), "grass", 13)
    if rng.random() < 0.4:  # a path
        x, spread = rng.uniform(0.1, 0.9) * width, rng.uniform(0.2, 0.5) * width
        far = rng.uniform(0.3, 0.7) * width
        _fill(
            picture,
            [(far - 4, horizon), (far + 4, horizon), (x + spread, height), (x - spread, height)],
            _tint(rng, (186, 174, 150), 8),
        )
    for x in rng.uniform(0, width, int(rng.integers(2, 7))):
        _tree(
            rng, picture, x, horizon + rng.uniform(0, 0.06) * height, rng.uniform(0.25, 0.75) * horizon + 20
        )
    return horizon


def _windows(
    rng: np.random.Generator, picture: Picture, x0: float, y0: float, x1: float, y1: float, wall: Color
) -> None:
    step_x, step_y = rng.uniform(22, 44), rng.uniform(30, 52)
    glass = _pick(rng, [(70, 86, 104), (120, 140, 156), (48, 54, 62)])
    for y in np.arange(y0 + 10, y1 - 0.7 * step_y, step_y):
        for x in np.arange(x0 + 8, x1 - 0.6 * step_x, step_x):
            _box(picture, x - 2, y - 2, x + 0.55 * step_x + 2, y + 0.6 * step_y + 2, _shaded(wall, 1.2))
            _box(picture, x, y, x + 0.55 * step_x, y + 0.6 * step_y, _shaded(glass, rng.uniform(0.8, 1.3)))


def _street(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    _sky(rng, picture, horizon)
    base = horizon + 0.05 * height
    _ground(
        rng, picture, horizon, _pick(rng, [(150, 148, 144), (172, 164, 152), (120, 120, 124)]), "plaster", 6
    )
    x = -rng.uniform(0, 60)
    while x < width:
        wide, roof = rng.uniform(80, 210), rng.uniform(-0.1, 0.75) * horizon
        wall = _pick(
            rng,
            [
                (170, 120, 96),
                (196, 184, 160),
                (150, 150, 150),
                (206, 176, 130),
                (132, 142, 156),
                (226, 220, 208),
            ],
        )
        _box(picture, x, roof, x + wide, base, wall)
        _windows(rng, picture, x, roof, x + wide, base - 0.16 * height, wall)
        if rng.random() < 0.6:  # a shop
            _box(
                picture,
                x + 8,
                base - 0.13 * height,
                x + wide - 8,
                base,
                _pick(rng, [(56, 60, 66), (140, 160, 170)]),
            )
            _box(
                picture,
                x + 4,
                base - 0.15 * height,
                x + wide - 4,
                base - 0.11 * height,
                _pick(rng, [(170, 50, 46), (40, 90, 120), (60, 110, 70), (220, 200, 150)]),
            )
        x += wide
    kerb = base + rng.uniform(0.05, 0.14) * height
    if rng.random() < 0.6:
        _box(picture, 0, kerb, width, height, _tint(rng, (92, 92, 96), 8))
        _box(picture, 0, kerb - 3, width, kerb, (196, 194, 188))
        add_texture(rng, picture[int(kerb) :], "plaster", 6)
        lane = kerb + 0.5 * (height - kerb)
        for start in np.arange(-40, width, 130):
            _fill(
                picture,
                [(start, lane), (start + 70, lane), (start + 62, lane + 8), (start - 10, lane + 8)],
                (214, 212, 204),
            )
    for _ in range(int(rng.integers(0, 3))):
        _car(rng, picture, rng.uniform(0, width), kerb, rng.uniform(0.16, 0.26) * height)
    if rng.random() < 0.4:
        _tree(rng, picture, rng.uniform(0, width), base + 8, rng.uniform(0.6, 1.0) * horizon + 30)
    return base


def _car(rng: np.random.Generator, picture: Picture, x: float, foot: float, tall: float) -> None:
    paint = _pick(rng, [(170, 40, 40), (60, 80, 130), (210, 210, 212), (50, 52, 56), (140, 146, 150)])
    long = 2.6 * tall
    sill = foot - 0.55 * tall
    roof = [(x + 0.32 * long, foot - tall), (x + 0.68 * long, foot - tall)]
    _fill(picture, [(x + 0.2 * long, sill), *roof, (x + 0.84 * long, sill)], (66, 82, 96))
    _box(picture, x, sill, x + long, foot - 0.15 * tall, paint)
    for wheel in (0.2, 0.8):
        cv2.circle(
            picture,
            (round(x + wheel * long), round(foot - 0.16 * tall)),
            round(0.18 * tall),
            (28, 28, 30),
            -1,
            cv2.LINE_AA,
        )
        cv2.circle(
            picture,
            (round(x + wheel * long), round(foot - 0.16 * tall)),
            round(0.08 * tall),
            (150, 150, 150),
            -1,
            cv2.LINE_AA,
        )


def _room(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    floor = horizon + rng.uniform(0.12, 0.26) * height
    wall = _pick(
        rng,
        [
            (222, 214, 198),
            (200, 206, 210),
            (188, 200, 178),
            (214, 190, 170),
            (168, 182, 200),
            (232, 230, 224),
        ],
    )
    _gradient(picture[: int(floor)], _shaded(wall, rng.uniform(0.8, 0.95)), _shaded(wall, 1.02))
    add_texture(rng, picture[: int(floor)], "plaster", 3)
    if rng.random() < 0.2:
        for x in np.arange(0, width, rng.uniform(24, 60)):
            _box(picture, x, 0, x + 8, floor, _shaded(wall, 0.93))
    wood = _pick(rng, [(160, 116, 74), (132, 96, 66), (190, 160, 122), (150, 150, 152), (112, 84, 74)])
    _gradient(picture[int(floor) :], _shaded(wood, 0.9), _shaded(wood, 1.08))
    for x in np.linspace(-2.0 * width, 3.0 * width, 44):  # planks run to one point
        vanish = 0.5 * width
        top = vanish + (x - vanish) * (floor - horizon) / (height - horizon)
        cv2.line(picture, (round(top), round(floor)), (round(x), height), _shaded(wood, 0.8), 1, cv2.LINE_AA)
    add_texture(rng, picture[int(floor) :], "plaster", 4)
    _box(picture, 0, floor - 9, width, floor, _shaded(wall, 1.1))
    for _ in range(int(rng.integers(2, 6))):
        x = rng.uniform(-0.05, 0.95) * width
        [_window, _frame, _door, _shelf, _sofa, _plant][int(rng.integers(6))](rng, picture, x, floor, height)
    return floor


def _window(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wide, tall, top = rng.uniform(70, 150), rng.uniform(0.3, 0.5) * floor, rng.uniform(0.05, 0.2) * floor
    _box(picture, x - 6, top - 6, x + wide + 6, top + tall + 6, (238, 236, 230))
    _box(picture, x, top, x + wide, top + tall, _tint(rng, (196, 216, 232), 12))
    _box(picture, x, top + 0.7 * tall, x + wide, top + tall, _tint(rng, (130, 152, 110), 14))
    _box(picture, x + wide / 2 - 3, top, x + wide / 2 + 3, top + tall, (238, 236, 230))
    if rng.random() < 0.5:
        curtain = _pick(rng, [(170, 70, 70), (90, 110, 150), (200, 190, 160), (80, 120, 100)])
        _box(picture, x - 26, top - 14, x + 6, top + 1.2 * tall, curtain)
        _box(picture, x + wide - 6, top - 14, x + wide + 26, top + 1.2 * tall, _shaded(curtain, 0.9))


def _frame(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wide, tall, top = rng.uniform(40, 100), rng.uniform(40, 90), rng.uniform(0.08, 0.3) * floor
    _box(picture, x, top, x + wide, top + tall, _pick(rng, [(60, 46, 36), (30, 30, 30), (190, 160, 90)]))
    inner = picture[
        max(0, round(top + 5)) : round(top + tall - 5), max(0, round(x + 5)) : max(0, round(x + wide - 5))
    ]
    if inner.size:
        _gradient(inner, _tint(rng, (150, 170, 190), 40), _tint(rng, (130, 120, 90), 40))


def _door(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wood = _pick(rng, [(140, 100, 66), (224, 222, 216), (90, 100, 110)])
    wide, tall = 0.2 * height, 0.56 * height
    _box(picture, x - 6, floor - tall - 6, x + wide + 6, floor, _shaded(wood, 0.8))
    _box(picture, x, floor - tall, x + wide, floor, wood)
    for y in (0.12, 0.55):
        _box(
            picture,
            x + 12,
            floor - tall * (1 - y),
            x + wide - 12,
            floor - tall * (0.66 - y),
            _shaded(wood, 0.88),
        )
    cv2.circle(
        picture, (round(x + wide - 10), round(floor - 0.46 * tall)), 4, (200, 180, 120), -1, cv2.LINE_AA
    )


def _shelf(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    wood, wide, tall = (
        _pick(rng, [(120, 84, 56), (210, 206, 198)]),
        rng.uniform(80, 150),
        rng.uniform(0.35, 0.6) * height,
    )
    _box(picture, x, floor - tall, x + wide, floor, _shaded(wood, 0.55))
    rows = 4
    for row in range(rows):
        base = floor - tall * row / rows
        at = x + 5
        while at < x + wide - 10:
            thick = rng.uniform(5, 13)
            book = _pick(
                rng,
                [(160, 50, 46), (50, 80, 120), (220, 210, 190), (60, 100, 70), (200, 150, 60), (70, 60, 60)],
            )
            _box(picture, at, base - tall / rows * rng.uniform(0.5, 0.8), at + thick - 1, base - 4, book)
            at += thick
        _box(picture, x, base - 4, x + wide, base, wood)
    _box(picture, x, floor - tall, x + 4, floor, wood)
    _box(picture, x + wide - 4, floor - tall, x + wide, floor, wood)


def _sofa(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    cloth = _pick(rng, [(120, 60, 60), (90, 100, 120), (150, 130, 100), (70, 90, 80), (190, 180, 170)])
    tall, wide, foot = 0.2 * height, 0.5 * height, floor + 0.05 * height
    for x0, x1, up, factor in (
        (0.08, 0.92, 1.0, 0.92),
        (0.1, 0.9, 0.5, 1.08),
        (0, 0.13, 0.68, 1.0),
        (0.87, 1, 0.68, 1.0),
    ):
        _box(picture, x + x0 * wide, foot - up * tall, x + x1 * wide, foot, _shaded(cloth, factor))
    cv2.line(
        picture,
        (round(x + 0.5 * wide), round(foot - tall)),
        (round(x + 0.5 * wide), round(foot)),
        _shaded(cloth, 0.7),
        2,
    )


def _plant(rng: np.random.Generator, picture: Picture, x: float, floor: float, height: int) -> None:
    foot, tall = floor + 0.03 * height, rng.uniform(0.2, 0.4) * height
    for angle in rng.normal(-90, 32, 9):
        tip = (
            x + tall * math.cos(math.radians(angle)),
            foot - 0.2 * tall + tall * 0.8 * math.sin(math.radians(angle)),
        )
        middle = ((x + tip[0]) / 2, (foot - 0.2 * tall + tip[1]) / 2)
        cv2.ellipse(
            picture,
            (round(middle[0]), round(middle[1])),
            (round(0.42 * tall), round(0.05 * tall)),
            angle,
            0,
            360,
            _pick(rng, [(50, 100, 56), (80, 126, 66)]),
            -1,
            cv2.LINE_AA,
        )
    _fill(
        picture,
        [
            (x - 0.14 * tall, foot - 0.25 * tall),
            (x + 0.14 * tall, foot - 0.25 * tall),
            (x + 0.1 * tall, foot),
            (x - 0.1 * tall, foot),
        ],
        _pick(rng, [(170, 92, 62), (210, 208, 204)]),
    )


def _hall(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    """A sports hall or a court: coloured floor with lines, rows of seats or a wall."""
    height, width = picture.shape[:2]
    floor = horizon + rng.uniform(0.05, 0.15) * height
    wall = _pick(rng, [(90, 100, 130), (60, 66, 76), (190, 186, 176), (130, 90, 80)])
    _gradient(picture[: int(floor)], _shaded(wall, 0.7), wall)
    if rng.random() < 0.55:
        for y in np.arange(0.35 * floor, floor - 16, 14):
            _box(picture, 0, y, width, y + 8, _shaded(wall, rng.uniform(0.75, 1.25)))
    _box(
        picture,
        0,
        floor - 22,
        width,
        floor,
        _pick(rng, [(40, 70, 140), (170, 50, 46), (230, 230, 228), (50, 110, 80)]),
    )
    court = _pick(rng, [(188, 134, 82), (62, 118, 92), (60, 96, 150), (170, 84, 62), (206, 170, 120)])
    _ground(rng, picture, floor, court, "plaster", 4)
    line = _pick(rng, [(240, 240, 236), (240, 240, 236), (230, 200, 80)])
    for _ in range(int(rng.integers(2, 5))):
        y, x = rng.uniform(floor + 5, height), rng.uniform(0, width)
        cv2.line(picture, (0, round(y)), (width, round(y + rng.normal(0, 12))), line, 3, cv2.LINE_AA)
        cv2.line(
            picture, (round(x), int(floor)), (round(x + 2 * (x - width / 2)), height), line, 3, cv2.LINE_AA
        )
    return floor


def _beach(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    height, width = picture.shape[:2]
    _sky(rng, picture, horizon)
    shore = horizon + rng.uniform(0.06, 0.2) * height
    _ground(rng, picture, shore, _pick(rng, [(222, 200, 160), (206, 186, 150)]), "plaster", 6)
    sea = picture[int(horizon) : int(shore)]
    _gradient(sea, _tint(rng, (50, 104, 146), 10), _tint(rng, (110, 170, 180), 10))
    add_texture(rng, sea, "plaster", 7)
    for y in np.linspace(horizon + 6, shore, 5):
        x = np.arange(0, width + 20, 20)
        wave = np.stack([x, y + 2 * np.sin(x / 30 + y)], axis=1)
        cv2.polylines(
            picture,
            [np.rint(wave).astype(np.int32)],
            False,
            (226, 236, 238),
            1 + int(y > shore - 2) * 2,
            cv2.LINE_AA,
        )
    return shore


def _snow(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    width = picture.shape[1]
    _sky(rng, picture, horizon)
    for high, color in ((0.8, (150, 164, 186)), (0.45, (196, 206, 220))):
        x = np.linspace(0, width, 12)
        y = horizon - horizon * high * rng.uniform(0.2, 1, 12)
        _fill(
            picture, [(0, horizon + 2), *zip(x, y, strict=True), (width, horizon + 2)], _tint(rng, color, 8)
        )
    _ground(rng, picture, horizon, _tint(rng, (232, 236, 242), 5), "plaster", 4)
    for x in rng.uniform(0, width, int(rng.integers(0, 8))):  # firs
        tall, foot = rng.uniform(30, 110), horizon + rng.uniform(0, 14)
        for level in range(3):
            y, half = foot - tall * (0.15 + 0.25 * level), tall * (0.24 - 0.06 * level)
            _fill(picture, [(x - half, y), (x + half, y), (x, y - 0.42 * tall)], _tint(rng, (44, 74, 62), 6))
    return horizon


def _studio(rng: np.random.Generator, picture: Picture, horizon: float) -> float:
    """Soft spots of colour, far out of focus."""
    height, width = picture.shape[:2]
    small = np.empty((height // 8, width // 8, 3), np.uint8)
    _gradient(small, _tint(rng, (120, 120, 120), 45), _tint(rng, (120, 116, 110), 45))
    for _ in range(int(rng.integers(6, 22))):
        at = (int(rng.integers(small.shape[1])), int(rng.integers(int(small.shape[0] * 0.7))))
        cv2.circle(small, at, int(rng.integers(2, 9)), _tint(rng, (140, 130, 120), 60), -1)
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


# ---------------------------------------------------------------------------------------------------


class Things:
    """Paints on the picture and takes the same pixels out of the buffer of ids."""

    def __init__(self, picture: Picture, ids: NDArray[np.uint16]) -> None:
        self.picture, self.ids = picture, ids

    def fill(self, points: list[tuple[float, float]], color: Color) -> None:
        _fill(self.picture, points, color)
        cv2.fillPoly(self.ids, [np.rint(np.array(points)).astype(np.int32)], 0)

    def circle(self, x: float, y: float, radius: float, color: Color) -> None:
        at, size = (round(x), round(y)), max(1, round(radius))
        cv2.circle(self.picture, at, size, color, -1, cv2.LINE_AA)
        cv2.circle(self.ids, at, size, 0, -1)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        self.fill([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)


def paint_seat(
    rng: np.random.Generator, things: Things, x: float, seat: float, foot: float, tall: float, turned: float
) -> None:
    """A chair, stool or bench whose top is at row `seat`, below and behind a sitter of `tall` px."""
    color = _pick(rng, [(150, 106, 66), (70, 74, 84), (176, 60, 52), (210, 206, 196), (60, 96, 120)])
    half = 0.15 * tall
    shift = 0.06 * tall * turned
    kind = pick(rng, ("chair", "stool", "bench"))
    if kind == "bench":
        half = 0.55 * tall
    if kind == "chair" and abs(turned) < 0.8:
        things.box(x - half - shift, seat - 0.28 * tall, x + half - shift, seat, _shaded(color, 0.85))
    elif kind == "chair":
        back = x - math.copysign(half, turned)
        things.box(back - 0.02 * tall, seat - 0.3 * tall, back + 0.02 * tall, seat, _shaded(color, 0.85))
    if kind == "stool":
        things.box(x - half, seat, x + half, foot, color)
        things.box(x - half, seat, x + half, seat + 0.04 * tall, _shaded(color, 1.2))
        return
    for leg in (-0.9, 0.9):
        at = x + leg * half
        things.box(at - 0.015 * tall, seat, at + 0.015 * tall, foot, _shaded(color, 0.6))
    things.box(x - half, seat, x + half, seat + 0.05 * tall, color)


def paint_occluder(
    rng: np.random.Generator, things: Things, x: float, foot: float, tall: float, indoor: bool
) -> None:
    """Something that stands in front of people of `tall` px: about a third as high, or a thin post."""
    kinds = ("table", "table", "box", "pot") if indoor else ("post", "bush", "bush", "rail", "box")
    kind = pick(rng, kinds)
    color = _pick(rng, [(146, 104, 66), (96, 100, 106), (196, 190, 178), (70, 90, 120), (150, 60, 50)])
    if kind == "table":
        half, high = rng.uniform(0.3, 0.5) * tall, rng.uniform(0.36, 0.44) * tall
        for leg in (-0.9, 0.9):
            things.box(
                x + leg * half - 0.02 * tall,
                foot - high,
                x + leg * half + 0.02 * tall,
                foot,
                _shaded(color, 0.7),
            )
        slope = 0.07 * tall
        things.fill(
            [
                (x - half + slope, foot - high - slope),
                (x + half - slope, foot - high - slope),
                (x + half, foot - high),
                (x - half, foot - high),
            ],
            _shaded(color, 1.1),
        )
        things.box(x - half, foot - high, x + half, foot - high + 0.04 * tall, _shaded(color, 0.85))
    elif kind == "box":
        half, high = rng.uniform(0.12, 0.24) * tall, rng.uniform(0.18, 0.36) * tall
        things.box(x - half, foot - high, x + half, foot, color)
        things.fill(
            [
                (x - half, foot - high),
                (x - 0.8 * half, foot - 1.2 * high),
                (x + 0.8 * half, foot - 1.2 * high),
                (x + half, foot - high),
            ],
            _shaded(color, 1.2),
        )
    elif kind == "post":
        half, high = rng.uniform(0.015, 0.035) * tall, rng.uniform(0.8, 1.6) * tall
        things.box(x - half, foot - high, x + half, foot, _shaded(color, 0.8))
        things.box(x - 0.4 * half, foot - high, x, foot, _shaded(color, 1.1))
    elif kind == "rail":
        half, high = rng.uniform(0.4, 1.2) * tall, rng.uniform(0.3, 0.45) * tall
        for bar in (1.0, 0.55):
            things.box(x - half, foot - bar * high, x + half, foot - bar * high + 0.025 * tall, color)
        for at in np.arange(x - half, x + half, 0.22 * tall):
            things.box(at, foot - high, at + 0.022 * tall, foot, _shaded(color, 0.85))
    else:  # a bush, or a plant in a pot
        green = _pick(rng, [(58, 96, 48), (76, 112, 54), (42, 80, 52)])
        high, half, low = rng.uniform(0.16, 0.34) * tall, rng.uniform(0.16, 0.35) * tall, foot
        if kind == "pot":
            half, low = 0.5 * half, foot - 0.12 * tall
            pot = [
                (x - 0.07 * tall, low),
                (x + 0.07 * tall, low),
                (x + 0.05 * tall, foot),
                (x - 0.05 * tall, foot),
            ]
            things.fill(pot, _pick(rng, [(170, 92, 62), (206, 204, 200)]))
        spots = rng.uniform(-1, 1, (26, 2)) * (half, 0.5 * high) + (x, low - 0.5 * high)
        for step, (bx, by) in enumerate(spots.tolist()):
            things.circle(bx, by, 0.09 * tall, _shaded(green, 0.75 + 0.5 * step / 26))
