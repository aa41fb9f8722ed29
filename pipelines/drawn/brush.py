"""The brush of drawn people: two solid shapes on a canvas with a depth buffer, and their shading.

Canvas axes: x right, y down, z towards the viewer, all three in px.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.drawn.body import SIDES, Array

PAIRED = ("ear", "upper_arm", "forearm", "hand", "thigh", "shank", "foot")
PARTS = ("torso", "skirt", "head", "hair", "hat", "bag", *(f"{s}_{name}" for s in SIDES for name in PAIRED))
PART = {name: index + 1 for index, name in enumerate(PARTS)}
"""Its number on the canvas, by name of a part of a person; 0 is nothing."""


@dataclass(frozen=True)
class Stroke:
    """A limb on the canvas. Its pixels are coloured at the end, when it is known which are seen."""

    part: str
    side: tuple[float, float, float]
    """Unit vector across the limb, in the plane of the canvas"""
    front: tuple[float, float, float]
    """Unit vector across the limb, towards the viewer"""
    colors: Array
    """float32 (3,), or (SHADES, 3) along the limb"""
    pattern: Pattern | None


Pattern = Callable[[Array, Array, "Stroke"], Array]
"""(along 0..1, across -1..1, stroke) -> float32 (n, 3) colours"""
Paint = Callable[[Array], Array]
"""Points of a ball in its own axes, px, (3, n) -> colours (n, 3) or (3,)"""
Keep = Callable[[Array], NDArray[np.bool_]]
"""Whether each of such points is painted, bool (n,)"""
NOTHING = -1e6
SHADES = 50
"""Colours along a limb."""
STEPS = 32
"""Widths along a limb."""


@dataclass
class Canvas:
    """A window of the picture with a depth buffer and, per pixel, the part that is seen there."""

    left: int
    top: int
    light: Array
    """Unit vector to the light."""
    ambient: float
    color: NDArray[np.uint8]
    """uint8 (h, w, 4) RGB and a filler: a pixel is then one word, which numpy scatters much faster"""
    depth: Array
    """float32 (h, w), px towards the viewer; NOTHING where nothing is"""
    part: NDArray[np.uint8]
    """uint8 (h, w), a value of PART; 0 where nothing is. Limbs enter with `color_strokes`."""
    stroke: NDArray[np.uint8]
    """uint8 (h, w): 1 + index of the stroke that is seen; 0 nothing or a ball"""
    along: Array
    """float32 (h, w) of that stroke: 0 start .. 1 end"""
    across: Array
    """float32 (h, w) of that stroke: -1..1, the normal's share along `side`"""
    strokes: list[Stroke]

    @classmethod
    def window(cls, left: int, top: int, width: int, height: int, light: Array, ambient: float) -> Canvas:
        """An empty one, whose top left pixel is (left, top) of the picture."""
        shape = (height, width)
        color, depth = np.zeros((*shape, 4), np.uint8), np.full(shape, NOTHING, np.float32)
        part, stroke = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        along, across = np.empty(shape, np.float32), np.empty(shape, np.float32)
        return cls(left, top, light, ambient, color, depth, part, stroke, along, across, [])

    def shade(self, cosine: Array) -> Array:
        """Brightness of a surface by the cosine between its normal and the light."""
        return self.ambient + (1.12 - self.ambient) * np.maximum(cosine, 0)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice] | None:
        """Rows and columns of the canvas that cover a box of picture px, or None."""
        height, width = self.part.shape
        left, right = max(0, int(x0) - self.left), min(width, int(x1) + 2 - self.left)
        top, bottom = max(0, int(y0) - self.top), min(height, int(y1) + 2 - self.top)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None

    def offsets(self, box: tuple[slice, slice], x: float, y: float) -> tuple[Array, Array]:
        """Pixels of a box relative to a point of the picture: x (w,), y (h, 1)."""
        rows, columns = box
        return (
            np.arange(columns.start + self.left - x, columns.stop + self.left - x - 0.5, dtype=np.float32),
            np.arange(rows.start + self.top - y, rows.stop + self.top - y - 0.5, dtype=np.float32)[:, None],
        )


def limb(
    canvas: Canvas,
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
    """A tapered solid along start -> end (canvas px), round at the ends unless `flat_end`.

    radii (n,): px at even steps along the axis. colors (3,) or (SHADES, 3) along it. With `frame`
    (columns: axes on the canvas) the cross section is an ellipse: `radii` along the frame's x, times
    `flatness` along its z.
    """
    ax, ay, az = start.tolist()
    bx, by, bz = end.tolist()
    length = math.hypot(bx - ax, by - ay) + 1e-3
    dx, dy, dz = (bx - ax) / length, (by - ay) / length, (bz - az) / length
    side = (-dy, dx, 0.0)
    cosine = 1 / math.hypot(1, dz)
    front = (-dz * cosine * dx, -dz * cosine * dy, cosine)
    wide = deep = 1.0
    if frame is not None:
        x_axis, z_axis = frame[:, 0], frame[:, 2]
        wide = math.hypot(dot(side, x_axis), flatness * dot(side, z_axis))
        deep = math.hypot(dot(front, x_axis), flatness * dot(front, z_axis))
    table = _between(len(radii)) @ (radii * np.float32(wide))
    reach = float(table.max())
    box = canvas.box(
        min(ax, bx) - reach - 1, min(ay, by) - reach - 1, max(ax, bx) + reach, max(ay, by) + reach
    )
    if box is None:
        return
    x, y = canvas.offsets(box, ax, ay)
    across, along = y * dx - x * dy, y * dy + x * dx
    on_axis = np.minimum(np.maximum(along, 0), length)
    radius = table[(on_axis * (STEPS / length)).astype(np.intp)]
    over = np.subtract(along, on_axis, out=along)
    over /= radius
    across /= radius
    rest = 1 - across * across
    rest -= over * over
    depth = np.sqrt(np.maximum(rest, 0))
    depth *= radius
    depth *= deep / wide
    on_axis /= length
    depth += on_axis * (length * dz)
    depth += az
    seen = (rest > 0) & (depth > canvas.depth[box])
    if flat_end:
        seen &= over <= 0
    canvas.strokes.append(Stroke(part, side, front, colors, pattern))
    np.copyto(canvas.depth[box], depth, where=seen)
    np.copyto(canvas.along[box], on_axis, where=seen)
    np.copyto(canvas.across[box], across, where=seen)
    canvas.stroke[box][seen] = len(canvas.strokes)


def ball(
    canvas: Canvas,
    part: str,
    center: Array,
    frame: Array,
    radii: tuple[float, float, float],
    paint: Array | Paint,
    keep: Keep | None = None,
) -> None:
    """An ellipsoid: center and radii in px, columns of `frame` its axes on the canvas.

    `paint` (a colour, or colours by place) and `keep` get the surface points in the ellipsoid's own
    axes, px, float32 (3, n).
    """
    size = np.asarray(radii, np.float32)
    reach_x, reach_y, _ = np.sqrt(((frame * size) ** 2).sum(axis=1)).tolist()
    cx, cy, cz = center.tolist()
    box = canvas.box(cx - reach_x - 1, cy - reach_y - 1, cx + reach_x, cy + reach_y)
    if box is None:
        return
    to_unit = (frame / size).T
    form = to_unit.T @ to_unit
    # p @ form @ p = 1 is a quadratic in z; the nearer root is seen.
    (xx, xy, xz), (_, yy, yz), (_, _, zz) = form.tolist()
    x, y = canvas.offsets(box, cx, cy)
    root = x * x * (xz * xz - zz * xx) + (y * y * (yz * yz - zz * yy) + zz)
    root += (y * (2 * (xz * yz - zz * xy))) * x
    z = (np.sqrt(np.maximum(root, 0)) - xz * x - yz * y) / zz
    row, column = np.nonzero((root > 0) & (z + cz > canvas.depth[box]))
    points = np.stack([x[column], y[row, 0], z[row, column]])
    if keep is not None:
        kept = keep(frame.T @ points)
        row, column, points = row[kept], column[kept], points[:, kept]
    normal = form @ points
    bright = canvas.shade((canvas.light @ normal) / np.sqrt((normal * normal).sum(axis=0)))
    color = paint(frame.T @ points) if callable(paint) else paint
    canvas.color[box][row, column, :3] = np.minimum(color * bright[:, None], 255)
    canvas.depth[box][row, column] = points[2] + np.float32(cz)
    canvas.part[box][row, column] = PART[part]
    canvas.stroke[box][row, column] = 0


def color_strokes(canvas: Canvas) -> None:
    """Colour and shade every pixel where a stroke is seen, and enter its part."""
    at = np.flatnonzero(canvas.stroke != 0)
    if len(at) == 0:
        return
    strokes = canvas.strokes
    stroke = canvas.stroke.reshape(-1)[at].astype(np.intp) - 1
    along, across = canvas.along.reshape(-1)[at], canvas.across.reshape(-1)[at]
    lit_side = np.array([dot(one.side, canvas.light) for one in strokes], np.float32)
    lit_front = np.array([dot(one.front, canvas.light) for one in strokes], np.float32)
    out = np.sqrt(1 - across * across)
    bright = canvas.shade(across * lit_side.take(stroke) + out * lit_front.take(stroke))
    table = np.zeros((len(strokes), SHADES, 4), np.float32)
    for row, one in zip(table, strokes, strict=True):
        row[:, :3] = one.colors
    color = table.reshape(-1, 4).take(stroke * SHADES + (along * (SHADES - 1)).astype(np.intp), axis=0)
    for index, one in enumerate(strokes):
        if one.pattern is not None:
            mine = np.flatnonzero(stroke == index)
            color[mine, :3] = one.pattern(along[mine], across[mine], one)
    color *= bright[:, None]
    words = np.minimum(color, 255, out=color).astype(np.uint8).view(np.uint32)
    canvas.color.view(np.uint32).reshape(-1)[at] = words[:, 0]
    canvas.part.reshape(-1)[at] = np.array([PART[one.part] for one in strokes], np.uint8).take(stroke)


@functools.cache
def _between(count: int) -> Array:
    """(STEPS + 1, count): linear interpolation of `count` values at STEPS + 1 even steps."""
    return np.stack(
        [np.interp(np.linspace(0, count - 1, STEPS + 1), np.arange(count), row) for row in np.eye(count)],
        axis=1,
    ).astype(np.float32)


def dot(a: tuple[float, float, float], b: Array) -> float:
    """Of two vectors (3,); many times faster than NumPy's."""
    x, y, z = b.tolist()
    return a[0] * x + a[1] * y + a[2] * z
