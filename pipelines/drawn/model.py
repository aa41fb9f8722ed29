"""The body on the canvas, as those who paint its parts share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.drawn.body import Array, Body
from pipelines.drawn.brush import Canvas, Pattern, limb

SIDES = ("left", "right")
LIMB_PARTS = ("ear", "upper_arm", "forearm", "hand", "thigh", "shank", "foot")
PARTS = ("torso", "skirt", "head", "hair", "hat", "bag", *(f"{s}_{n}" for s in SIDES for n in LIMB_PARTS))
PART = {name: index + 1 for index, name in enumerate(PARTS)}
NOSE, LIPS = np.array([0.94, 0.80, 0.76], np.float32), np.array([0.74, 0.46, 0.46], np.float32)


@dataclass(frozen=True)
class Model:
    """What the painters below share: the body on the canvas."""

    canvas: Canvas
    body: Body
    points: dict[str, Array]
    """(3,) canvas px"""
    frames: dict[str, Array]
    """(3, 3) columns: axes on the canvas"""
    scale: float
    """px per stature"""

    def limb(
        self,
        part: str,
        start: Array,
        end: Array,
        radii: Array,
        colors: Array,
        frame: Array | None = None,
        flatness: float = 1.0,
        flat_end: bool = False,
        pattern: Pattern | None = None,
    ) -> None:
        limb(self.canvas, PART[part], start, end, radii, colors, frame, flatness, flat_end, pattern)


def part_radii(values: tuple[float, ...], factor: float) -> Array:
    return np.array(values, np.float32) * np.float32(factor)
