"""A posed body painted as a dressed person, with keypoints and what the body itself hides of them.

body.py poses, brush.py knows how to paint a solid, picture.py puts people into pictures.

Canvas axes: x right, y down, z towards the viewer, all in px. A person who faces us has the left hand on
the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from hrnet_core.skeleton import COCO17
from pipelines.drawn.body import LENGTHS, SIDES, Array, Body, Figure, turn_x, turn_y, turn_z
from pipelines.drawn.brush import SHADES, Canvas, Pattern, Stroke, ball, color_strokes, dot, limb
from pipelines.drawn.head import paint_head
from pipelines.drawn.model import Model, part_radii
from pipelines.drawn.visibility import self_visibility


@dataclass(frozen=True)
class View:
    """How the camera sees a figure."""

    turn: Array
    """(3, 3) body axes -> canvas axes"""
    scale: float
    """px per stature at the pelvis"""
    foot: tuple[float, float]
    """picture px of the ground below the pelvis"""
    distance: float
    """of the camera, in statures"""

    def project(self, points: Array) -> Array:
        """(n, 3) statures -> (n, 3) canvas px. Perspective about the middle of the body."""
        seen = points @ self.turn.T
        seen[:, 1] += 0.5
        placed = seen * (self.distance / (self.distance - seen[:, 2:])) * np.float32(self.scale)
        return placed + np.array([self.foot[0], self.foot[1] - 0.5 * self.scale, 0], np.float32)


def look_at(yaw: float, pitch: float, roll: float) -> Array:
    """(3, 3) body -> canvas: yaw 0 faces us, 90 looks to the right; pitch: camera above; roll: tilted."""
    return np.diag(np.array([1, -1, 1], np.float32)) @ turn_z(roll) @ turn_x(pitch) @ turn_y(yaw)


@dataclass(frozen=True)
class Painted:
    """A person on a window of the picture."""

    left: int
    top: int
    color: NDArray[np.uint8]
    """uint8 (h, w, 3) RGB"""
    part: NDArray[np.uint8]
    """uint8 (h, w): a value of brush.PART, 0 outside the person"""
    keypoints: Array
    """float32 (17, 2) px of the picture"""
    seen: NDArray[np.int64]
    """int64 (17,): `self_visibility`, other people not considered"""
    figure: Figure
    view: View

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the picture"""
        height, width = self.part.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def paint_person(
    body: Body, figure: Figure, view: View, size: tuple[int, int], light: Array, ambient: float
) -> Painted | None:
    """Paint onto a window of a picture of `size` (width, height); None when wholly outside."""
    placed = view.project(np.stack(list(figure.points.values())))
    points = dict(zip(figure.points, placed, strict=True))
    margin = 0.12 * view.scale
    left, top = np.floor(np.maximum(placed[:, :2].min(axis=0) - margin, 0)).astype(int).tolist()
    right, bottom = np.ceil(np.minimum(placed[:, :2].max(axis=0) + margin, size)).astype(int).tolist()
    if right - left < 2 or bottom - top < 2:
        return None
    canvas = Canvas.window(left, top, right - left, bottom - top, light, ambient)
    frames: dict[str, Array] = {name: view.turn @ frame for name, frame in figure.frames.items()}
    model = Model(canvas, body, points, frames, view.scale)
    _paint_trunk(model)
    for side in SIDES:
        _paint_arm(model, side)
        _paint_leg(model, side)
    paint_head(model)
    if body.clothes.lower in ("skirt", "dress"):
        _paint_skirt(model)
    if body.clothes.backpack:
        _paint_backpack(model)
    color_strokes(canvas)
    keypoints = np.stack([points[name] for name in COCO17.keypoints])
    seen = self_visibility(canvas, keypoints, frames["head"], view.scale)
    return Painted(left, top, _finish(canvas, view.scale), canvas.part, keypoints[:, :2], seen, figure, view)


ALONG = (np.arange(SHADES, dtype=np.float32) + 0.5) / SHADES


def _two_tone(first: Array, second: Array, cut: float) -> Array:
    """(SHADES, 3): the first colour up to `cut` along the limb, the second beyond."""
    return np.where((cut > ALONG)[:, None], first, second)


def _shirt(body: Body, frame: Array) -> Pattern:
    """The top from waist to neck; its pattern is fixed to the chest and turns away with the person."""
    kind, top, second = body.clothes.pattern, body.clothes.top, body.clothes.second

    def pattern(up: Array, across: Array, stroke: Stroke) -> Array:
        left, ahead = _facing(across, stroke, frame)
        if kind == "hoops":
            marked = np.floor(up * 7) % 2 == 1
        elif kind == "stripes":
            marked = np.floor(np.arctan2(left, ahead) * 3.2 + 0.5) % 2 == 1
        elif kind == "check":
            marked = (np.floor(up * 6) + np.floor(np.arctan2(left, ahead) * 2.5)) % 2 == 1
        elif kind == "logo":
            marked = (np.abs(left) < 0.42) & (np.abs(up - 0.55) < 0.13) & (ahead > 0)
        elif kind == "badge":
            marked = (np.abs(left - 0.48) < 0.2) & (np.abs(up - 0.62) < 0.09) & (ahead > 0)
        elif kind == "open":
            marked = (np.abs(left) < 0.28) & (ahead > 0)
        else:
            marked = np.zeros(len(up), bool)
        color = np.where(marked[:, None], second, top)
        # The neckline is lower in front than behind.
        color[up > np.where(ahead > 0, 0.83 + 0.55 * np.abs(left), 0.97)] = body.skin
        return color

    return pattern


def _seat(colors: Array, frame: Array) -> Pattern:
    """Trousers with two pockets behind."""

    def pattern(up: Array, across: Array, stroke: Stroke) -> Array:
        color = colors.take((up * (SHADES - 1)).astype(np.intp), axis=0)
        left, ahead = _facing(across, stroke, frame)
        pocket = (ahead < 0) & (np.abs(np.abs(left) - 0.42) < 0.2) & (np.abs(up - 0.24) < 0.12)
        color[pocket] *= 0.72
        return color

    return pattern


def _facing(across: Array, stroke: Stroke, frame: Array) -> tuple[Array, Array]:
    """Cosines of the normal with the frame's x (left) and z (ahead)."""
    out = np.sqrt(1 - across * across)
    left, ahead = (
        across * dot(stroke.side, axis) + out * dot(stroke.front, axis) for axis in (frame[:, 0], frame[:, 2])
    )
    return left, ahead


def _paint_trunk(model: Model) -> None:
    """From the crotch to the neck: hips, ribs, shoulders."""
    canvas, body, points, scale = model.canvas, model.body, model.points, model.scale
    wide = scale * (0.5 + 0.5 * body.girth)
    pelvis, chest = model.frames["pelvis"], model.frames["chest"]
    shoulders = body.lengths["shoulder_half"] / LENGTHS["shoulder_half"]
    crotch = points["pelvis"] - pelvis[:, 1] * (0.035 * scale)
    hips = part_radii((0.072, 0.090, 0.094, 0.092, 0.086, 0.082), wide * body.hips)
    clothes = body.clothes
    belt = clothes.top * 0.55 if clothes.lower == "dress" else clothes.bottom * 0.45
    lower = np.where((ALONG < 0.5)[:, None], clothes.bottom, _two_tone(belt, clothes.top, 0.56))
    seat, waist, neck = _seat(lower, pelvis), points["waist"], points["neck"]
    limb(canvas, "torso", crotch, waist, hips, lower, pelvis, 0.74, pattern=seat)
    ribs = part_radii((0.082, 0.087, 0.096, 0.105, 0.110, 0.104, 0.080, 0.045), wide * shoulders)
    limb(canvas, "torso", waist, neck, ribs, clothes.top, chest, 0.68, pattern=_shirt(body, chest))
    left, right = points["left_shoulder"], points["right_shoulder"]
    reach = 0.08 * (left - right)
    yoke = part_radii((0.038, 0.047, 0.050, 0.047, 0.038), wide)
    limb(canvas, "torso", left - reach, right + reach, yoke, clothes.top, chest)
    head = model.frames["head"]
    top = points["skull"] - head[:, 1] * (0.3 * body.lengths["head"] * scale)
    limb(canvas, "torso", neck, top, part_radii((0.042, 0.034, 0.032), wide), body.skin)


LOOSE_SLEEVE = np.linspace(1.1, 1.2, 6, dtype=np.float32)
SHORT_SLEEVE = np.array([1.02, 1.08, 1.18, 1.25, 1.0, 1.0], np.float32)
WATCH = np.array([30, 30, 34], np.float32)


def _paint_arm(model: Model, side: str) -> None:
    body, clothes = model.body, model.body.clothes
    thick = model.scale * body.girth
    upper = part_radii((0.037, 0.039, 0.036, 0.034, 0.032, 0.029), thick)
    fore = part_radii((0.029, 0.031, 0.029, 0.025, 0.021, 0.018), thick)
    cut, fore_cut = {"none": (0.0, 0.0), "short": (0.55, 0.0), "long": (1.0, 0.92)}[clothes.sleeves]
    if clothes.sleeves == "long":
        upper, fore = upper * np.float32(1.08), fore * LOOSE_SLEEVE
    elif clothes.sleeves == "short":
        upper = upper * SHORT_SLEEVE
    shoulder, elbow, wrist, fingers = (
        model.points[f"{side}_{n}"] for n in ("shoulder", "elbow", "wrist", "fingers")
    )
    limb(model.canvas, f"{side}_upper_arm", shoulder, elbow, upper, _two_tone(clothes.top, body.skin, cut))
    sleeve = _two_tone(clothes.top, body.skin, fore_cut)
    if clothes.watch and side == "left" and clothes.sleeves != "long":
        sleeve = np.where((np.abs(ALONG - 0.88) < 0.06)[:, None], WATCH, body.skin)
    limb(model.canvas, f"{side}_forearm", elbow, wrist, fore, sleeve)
    hand = part_radii((0.017, 0.024, 0.027, 0.025, 0.016), model.scale * (0.6 + 0.4 * body.girth))
    flat = model.frames[f"{side}_forearm"][:, [2, 1, 0]]
    limb(model.canvas, f"{side}_hand", wrist, fingers, hand, body.skin, flat, 0.55)


LOOSE_TROUSERS = np.linspace(1.1, 1.35, 6, dtype=np.float32)
SHORTS = np.array([1.05, 1.08, 1.12, 1.18, 1.0, 1.0], np.float32)
SOCKS = np.array([228, 228, 226], np.float32)


def _paint_leg(model: Model, side: str) -> None:
    body, clothes, scale = model.body, model.body.clothes, model.scale
    thick = scale * (0.3 + 0.7 * body.girth)
    hip, knee, ankle = (model.points[f"{side}_{n}"] for n in ("hip", "knee", "ankle"))
    thigh = part_radii((0.066, 0.067, 0.062, 0.055, 0.048, 0.043), thick)
    shank = part_radii((0.042, 0.045, 0.046, 0.039, 0.030, 0.025), thick)
    cut = 0.3
    below = _two_tone(body.skin, SOCKS, clothes.socks)
    if clothes.lower == "trousers":
        cut, below = 1.0, _two_tone(clothes.bottom, clothes.bottom, 1.0)
        thigh, shank = thigh * np.float32(1.05), shank * LOOSE_TROUSERS
    elif clothes.lower == "shorts":
        cut, thigh = 0.78, thigh * SHORTS
    limb(model.canvas, f"{side}_thigh", hip, knee, thigh, _two_tone(clothes.bottom, body.skin, cut))
    limb(model.canvas, f"{side}_shank", knee, ankle, shank, below)
    frame = model.frames[f"{side}_foot"]
    up = frame[:, 1] * (0.024 * scale)
    heel, toe = model.points[f"{side}_heel"] + up, model.points[f"{side}_toe"] + up * 0.8
    shoe, flat = part_radii((0.028, 0.033, 0.034, 0.032, 0.024), scale), frame[:, [0, 2, 1]]
    leather = _two_tone(clothes.shoes, clothes.toe_caps, 0.72)
    limb(model.canvas, f"{side}_foot", heel, toe, shoe, leather, flat, 0.85)


def _paint_skirt(model: Model) -> None:
    """From the waist to above the knees, wide enough for both thighs."""
    points, scale = model.points, model.scale
    knees = 0.5 * (points["left_knee"] + points["right_knee"])
    end = points["pelvis"] + 0.8 * (knees - points["pelvis"])
    apart = 0.5 * float(np.linalg.norm(points["left_knee"] - points["right_knee"]))
    waist = 0.098 * scale * (0.5 + 0.5 * model.body.girth) * model.body.hips
    hem = max(1.25 * waist, 0.75 * apart + 0.055 * scale)
    radii = np.array([0.85 * waist, waist, 0.4 * waist + 0.6 * hem, hem], np.float32)
    start = 0.5 * (points["waist"] + points["pelvis"])
    cloth, frame = model.body.clothes.bottom, model.frames["pelvis"]
    limb(model.canvas, "skirt", start, end, radii, cloth, frame, 0.8, flat_end=True)


def _paint_backpack(model: Model) -> None:
    chest, scale = model.frames["chest"], model.scale
    middle = 0.45 * model.points["waist"] + 0.55 * model.points["neck"]
    center = middle - chest[:, 2] * (0.1 * scale)
    cloth = model.body.clothes.second
    ball(model.canvas, "bag", center, chest, (0.095 * scale, 0.13 * scale, 0.065 * scale), cloth)


def _finish(canvas: Canvas, scale: float) -> NDArray[np.uint8]:
    """The canvas as uint8, with a soft dark line where one part passes in front of another."""
    nearest = cv2.dilate(canvas.depth, np.ones((3, 3), np.uint8))
    gap = cv2.convertScaleAbs(cv2.subtract(nearest, canvas.depth), alpha=970 / scale)
    _, gap = cv2.threshold(gap, 97, 97, cv2.THRESH_TRUNC)
    bright = cv2.blur(cv2.bitwise_not(gap), (3, 3))
    color = cv2.cvtColor(canvas.color, cv2.COLOR_RGBA2RGB)
    return np.asarray(cv2.multiply(color, cv2.merge([bright, bright, bright]), scale=1 / 255), np.uint8)
