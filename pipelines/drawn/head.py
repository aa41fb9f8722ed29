"""Painting a head: skull, hair, face, hat."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pipelines.drawn.body import Array
from pipelines.drawn.brush import Keep, Paint, ball, limb
from pipelines.drawn.model import Model, part_radii

# Solids of the head: center and radii in head heights, axes of the head; origin at the skull.
HAIR_SHAPES = {
    "crop": ((0.0, 0.03, -0.03), (0.36, 0.405, 0.435)),
    "short": ((0.0, 0.05, -0.04), (0.375, 0.425, 0.45)),
    "bun": ((0.0, 0.04, -0.03), (0.37, 0.415, 0.44)),
    "tail": ((0.0, 0.04, -0.03), (0.37, 0.415, 0.44)),
    "bob": ((0.0, -0.02, -0.07), (0.425, 0.50, 0.46)),
    "long": ((0.0, -0.02, -0.07), (0.425, 0.50, 0.46)),
    "afro": ((0.0, 0.12, -0.08), (0.53, 0.52, 0.53)),
    "bald": ((0.0, 0.0, -0.04), (0.365, 0.42, 0.44)),
}
HAT_SHAPES = {
    "cap": ((0.0, 0.06, -0.02), (0.395, 0.42, 0.46), 0.14),
    "beanie": ((0.0, 0.07, -0.03), (0.395, 0.47, 0.46), 0.10),
    "brim": ((0.0, 0.10, -0.02), (0.40, 0.46, 0.46), 0.16),
}
# Of the skin.
NOSE, LIPS = np.array([0.94, 0.80, 0.76], np.float32), np.array([0.74, 0.46, 0.46], np.float32)
EAR = np.float32(0.92)
Triple = tuple[float, float, float]


def paint_head(model: Model) -> None:
    """Onto the canvas, all that is above the neck."""
    body, (to_left, _, ahead) = model.body, model.frames["head"][2].tolist()
    # What the head hides for certain is not painted at all.
    face, jaw = (_face(model), _jaw(model)) if ahead > -0.6 else (body.skin, body.skin)
    _head_ball(model, "head", (0, 0, 0), (0.345, 0.40, 0.42), face)
    _head_ball(model, "head", (0, -0.2, 0.06), (0.27, 0.31, 0.33), jaw)
    if ahead > -0.6:
        _head_ball(model, "head", (0, -0.12, 0.40), (0.055, 0.1, 0.07), body.skin * NOSE)
    for side, sign in (("left", 1), ("right", -1)):
        if sign * to_left > -0.6:
            place = (0.345 * sign, -0.07, -0.02)
            _head_ball(model, f"{side}_ear", place, (0.045, 0.095, 0.06), body.skin * EAR)
    _paint_hair(model)
    if body.clothes.hat:
        _paint_hat(model)


def _head_point(model: Model, place: Triple) -> Array:
    tall = model.body.lengths["head"] * model.scale
    return model.points["skull"] + model.frames["head"] @ (np.array(place, np.float32) * np.float32(tall))


def _head_ball(
    model: Model,
    part: str,
    place: Triple,
    radii: Triple,
    paint: Array | Paint,
    keep: Keep | None = None,
) -> None:
    """A ball of the head, everything in head heights; `keep` gets head coordinates."""
    tall = model.body.lengths["head"] * model.scale
    offset = np.array(place, np.float32)[:, None]
    kept = None if keep is None else (lambda p: keep(p / tall + offset))
    size = (tall * radii[0], tall * radii[1], tall * radii[2])
    ball(model.canvas, part, _head_point(model, place), model.frames["head"], size, paint, kept)


def _face(model: Model) -> Paint:
    """Skin with eyes, brows and glasses."""
    tall = np.float32(model.body.lengths["head"] * model.scale)
    skin, dark, glasses = model.body.skin, np.minimum(model.body.hair, 90.0), model.body.clothes.glasses

    def paint(p: Array) -> Array:
        color = np.broadcast_to(skin, (p.shape[1], 3)).copy()
        front = np.flatnonzero(p[2] > 0)
        x, y = np.abs(p[0, front]) / tall - 0.15, p[1, front] / tall + 0.01
        color[front[(x / 0.078) ** 2 + (y / 0.05) ** 2 < 1]] = (240, 238, 234)
        color[front[x * x + y * y < 0.038**2]] = (38, 28, 24)
        color[front[(np.abs(x) < 0.085) & (np.abs(y - 0.1) < 0.022)]] = dark
        if glasses == "sun":
            color[front[(x / 0.12) ** 2 + (y / 0.085) ** 2 < 1]] = (20, 20, 24)
        if glasses:
            rim = np.abs(np.sqrt((x / 0.125) ** 2 + (y / 0.1) ** 2) - 1) < 0.2
            color[front[rim | ((np.abs(y) < 0.02) & (x > 0.11))]] = (34, 30, 30)
        return color

    return paint


def _jaw(model: Model) -> Paint:
    """Skin with the mouth, and a beard."""
    tall, body = np.float32(model.body.lengths["head"] * model.scale), model.body

    def paint(p: Array) -> Array:
        x, y = p[0] / tall, p[1] / tall
        color = np.broadcast_to(body.skin, (p.shape[1], 3)).copy()
        if body.beard:
            color[(y < 0.02) & (p[2] > -0.06 * tall)] = body.hair * 0.9
        color[(p[2] > 0) & (np.abs(x) < 0.11) & (np.abs(y + 0.085) < 0.03)] = body.skin * LIPS
        return color

    return paint


def _paint_hair(model: Model) -> None:
    style, hat = model.body.hair_style, bool(model.body.clothes.hat)
    tall = model.body.lengths["head"] * model.scale
    color, place = model.body.hair, functools.partial(_head_point, model)
    low = -0.34 if style in ("bob", "long") else -0.2

    def strands(p: Array) -> Array:
        return color * (1 + 0.12 * np.sin(p[0] * (22 / tall) + p[2] * (13 / tall)))[:, None]

    def keep(p: Array) -> NDArray[np.bool_]:
        x, y, z = p
        behind = z < 0.3 * np.maximum(y, 0) + 0.12 * np.minimum(y, 0)
        if style == "bald":
            return (z < -0.04) & (y > -0.27) & (y < 0.27)
        # Above the forehead, with a parting on the left.
        return ((y > 0.235 - 0.12 * x) | behind) & (y > low) & ((y < 0.2) | (not hat))

    _head_ball(model, "hair", *HAIR_SHAPES[style], strands, keep)
    if style == "bun" and not hat:
        _head_ball(model, "hair", (0, 0.30, -0.36), (0.17, 0.16, 0.17), strands)
    elif style == "tail":
        radii = part_radii((0.09, 0.13, 0.12, 0.05), tall)
        limb(model.canvas, "hair", place((0, 0.02, -0.42)), place((0, -0.62, -0.58)), radii, color)
    elif style == "long":
        radii = part_radii((0.38, 0.40, 0.38, 0.30), tall)
        ends = place((0, -0.1, -0.2)), place((0, -0.8, -0.3))
        limb(model.canvas, "hair", *ends, radii, color, model.frames["head"], 0.45)


def _paint_hat(model: Model) -> None:
    hat, cloth = model.body.clothes.hat, model.body.clothes.hat_color
    place, radii, edge = HAT_SHAPES[hat]
    _head_ball(model, "hat", place, radii, cloth, lambda p: p[1] > edge)
    if hat == "cap":
        _head_ball(model, "hat", (0, 0.17, 0.5), (0.27, 0.04, 0.27), cloth * 0.85)
    elif hat == "brim":
        _head_ball(model, "hat", (0, 0.18, 0), (0.66, 0.045, 0.68), cloth * 0.9)
