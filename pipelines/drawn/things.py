"""Things that stand before people, or under them, and hide what is behind them."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.drawn.chance import pick
from pipelines.drawn.flat import Color, Picture, Points, fill, one_of, shaded, trapezium


class Things:
    """Paints on the picture and takes the same pixels out of the buffer of ids."""

    def __init__(self, picture: Picture, ids: NDArray[np.uint16]) -> None:
        self.picture, self.ids = picture, ids

    def fill(self, points: Points, color: Color) -> None:
        fill(self.picture, points, color)
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
    color = one_of(rng, [(150, 106, 66), (70, 74, 84), (176, 60, 52), (210, 206, 196), (60, 96, 120)])
    half = 0.15 * tall
    shift = 0.06 * tall * turned
    kind = pick(rng, ("chair", "stool", "bench"))
    if kind == "bench":
        half = 0.55 * tall
    if kind == "chair" and abs(turned) < 0.8:
        things.box(x - half - shift, seat - 0.28 * tall, x + half - shift, seat, shaded(color, 0.85))
    elif kind == "chair":
        back = x - math.copysign(half, turned)
        things.box(back - 0.02 * tall, seat - 0.3 * tall, back + 0.02 * tall, seat, shaded(color, 0.85))
    if kind == "stool":
        things.box(x - half, seat, x + half, foot, color)
        things.box(x - half, seat, x + half, seat + 0.04 * tall, shaded(color, 1.2))
        return
    for leg in (-0.9, 0.9):
        at = x + leg * half
        things.box(at - 0.015 * tall, seat, at + 0.015 * tall, foot, shaded(color, 0.6))
    things.box(x - half, seat, x + half, seat + 0.05 * tall, color)


def paint_occluder(
    rng: np.random.Generator, things: Things, x: float, foot: float, tall: float, indoor: bool
) -> None:
    """Something that stands in front of people of `tall` px: about a third as high, or a thin post."""
    kinds = ("table", "table", "box", "pot") if indoor else ("post", "bush", "bush", "rail", "box")
    kind = pick(rng, kinds)
    color = one_of(rng, [(146, 104, 66), (96, 100, 106), (196, 190, 178), (70, 90, 120), (150, 60, 50)])
    if kind == "table":
        half, high = rng.uniform(0.3, 0.5) * tall, rng.uniform(0.36, 0.44) * tall
        for leg in (-0.9, 0.9):
            at = x + leg * half
            things.box(at - 0.02 * tall, foot - high, at + 0.02 * tall, foot, shaded(color, 0.7))
        slope = 0.07 * tall
        board = trapezium(x, foot - high - slope, half - slope, foot - high, half)
        things.fill(board, shaded(color, 1.1))
        things.box(x - half, foot - high, x + half, foot - high + 0.04 * tall, shaded(color, 0.85))
    elif kind == "box":
        half, high = rng.uniform(0.12, 0.24) * tall, rng.uniform(0.18, 0.36) * tall
        things.box(x - half, foot - high, x + half, foot, color)
        rim, lid, inner = foot - high, foot - 1.2 * high, 0.8 * half
        things.fill(
            [(x - half, rim), (x - inner, lid), (x + inner, lid), (x + half, rim)], shaded(color, 1.2)
        )
    elif kind == "post":
        half, high = rng.uniform(0.015, 0.035) * tall, rng.uniform(0.8, 1.6) * tall
        things.box(x - half, foot - high, x + half, foot, shaded(color, 0.8))
        things.box(x - 0.4 * half, foot - high, x, foot, shaded(color, 1.1))
    elif kind == "rail":
        half, high = rng.uniform(0.4, 1.2) * tall, rng.uniform(0.3, 0.45) * tall
        for bar in (1.0, 0.55):
            things.box(x - half, foot - bar * high, x + half, foot - bar * high + 0.025 * tall, color)
        for at in np.arange(x - half, x + half, 0.22 * tall):
            things.box(at, foot - high, at + 0.022 * tall, foot, shaded(color, 0.85))
    else:  # a bush, or a plant in a pot
        green = one_of(rng, [(58, 96, 48), (76, 112, 54), (42, 80, 52)])
        high, half, low = rng.uniform(0.16, 0.34) * tall, rng.uniform(0.16, 0.35) * tall, foot
        if kind == "pot":
            half, low = 0.5 * half, foot - 0.12 * tall
            pot = trapezium(x, low, 0.07 * tall, foot, 0.05 * tall)
            things.fill(pot, one_of(rng, [(170, 92, 62), (206, 204, 200)]))
        spots = rng.uniform(-1, 1, (26, 2)) * (half, 0.5 * high) + (x, low - 0.5 * high)
        for step, (bx, by) in enumerate(spots.tolist()):
            things.circle(bx, by, 0.09 * tall, shaded(green, 0.75 + 0.5 * step / 26))
