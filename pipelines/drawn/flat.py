"""Flat shapes, colours and textures on a picture: what scenes and things are painted with. RGB, in place."""

from __future__ import annotations

import functools

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""uint8 (h, w, 3) RGB"""
Color = tuple[float, float, float]
"""RGB, 0..255"""
Points = list[tuple[float, float]]
"""(x, y) px"""
TEXTURE_SIZE = 720
"""px; no picture is wider or higher"""


@functools.cache
def texture(name: str) -> Picture:
    """uint8 (TEXTURE_SIZE, TEXTURE_SIZE, 3): 128 and noise of standard deviation 16. name: grain, grass,
    cloud, plaster."""
    rng = np.random.default_rng(7)
    size = TEXTURE_SIZE
    if name == "grain":
        noise = rng.normal(0, 1, (size, size, 3)).astype(np.float32)
    elif name == "grass":
        blades = cv2.GaussianBlur(rng.normal(0, 1, (size, size)).astype(np.float32), (0, 0), 0.8, sigmaY=2.2)
        noise = blades / blades.std() + 0.8 * _smooth(rng, size, 12)
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
    smooth = cv2.resize(cv2.GaussianBlur(noise, (0, 0), sigma / small), (size, size))
    return smooth / smooth.std()


def add_texture(rng: np.random.Generator, area: Picture, name: str, strength: float) -> None:
    """Add `strength` grey levels (standard deviation) of a texture to a part of a picture, in place."""
    height, width = area.shape[:2]
    if height == 0 or width == 0:
        return
    y, x = (int(rng.random() * (TEXTURE_SIZE - side)) for side in (height, width))
    tile = texture(name)[y : y + height, x : x + width]
    area[:] = cv2.addWeighted(area, 1.0, tile, strength / 16, -8 * strength)


def gradient(area: Picture, above: Color, below: Color) -> None:
    """Fill a part of a picture, in place, from its first row to its last."""
    ramp = np.linspace(0, 1, max(1, area.shape[0]), dtype=np.float32)[:, None]
    column = np.array(above, np.float32) * (1 - ramp) + np.array(below, np.float32) * ramp
    area[:, 0] = np.clip(column, 0, 255).astype(np.uint8)
    done, width = 1, area.shape[1]
    while done < width:  # doubling: many times faster than repeating one pixel of three bytes
        more = min(done, width - done)
        area[:, done : done + more] = area[:, :more]
        done += more


def tint(rng: np.random.Generator, color: Color, spread: float = 14) -> Color:
    """A colour near this one: each channel off by `spread` levels (standard deviation), all by half of it."""
    r, g, b = (rng.standard_normal(3) * spread + rng.standard_normal() * (0.5 * spread)).tolist()
    return (_level(color[0] + r), _level(color[1] + g), _level(color[2] + b))


def _level(value: float) -> float:
    return min(max(value, 0.0), 255.0)


def one_of(rng: np.random.Generator, colors: list[Color]) -> Color:
    """A colour near one of these."""
    return tint(rng, colors[int(rng.integers(len(colors)))])


def shaded(color: Color, factor: float) -> Color:
    """The colour, darker below 1 and lighter above."""
    return (min(255, color[0] * factor), min(255, color[1] * factor), min(255, color[2] * factor))


def fill(picture: Picture, points: Points, color: Color) -> None:
    """A polygon, its rim smooth."""
    fixed = np.rint(np.array(points) * 16).astype(np.int32)
    cv2.fillPoly(picture, [fixed], color, cv2.LINE_AA, 4)


def box(picture: Picture, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
    """An upright rectangle, px; whole pixels."""
    cv2.rectangle(picture, (round(x0), round(y0)), (round(x1), round(y1)), color, -1)


def trapezium(x: float, top: float, half_top: float, foot: float, half_foot: float) -> Points:
    """Corners of an upright one about the column x, with half of its width above and below."""
    return [(x - half_top, top), (x + half_top, top), (x + half_foot, foot), (x - half_foot, foot)]
