"""The body on the canvas, as those who paint its parts share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.drawn.body import Array, Body
from pipelines.drawn.brush import Canvas


@dataclass(frozen=True)
class Model:
    """A posed person where the canvas shows them."""

    canvas: Canvas
    body: Body
    points: dict[str, Array]
    """(3,) canvas px"""
    frames: dict[str, Array]
    """(3, 3) columns: axes on the canvas"""
    scale: float
    """px per stature"""


def part_radii(values: tuple[float, ...], factor: float) -> Array:
    """float32 (n,) of a limb in px: values in statures or heads, factor px of one."""
    return np.array(values, np.float32) * np.float32(factor)
