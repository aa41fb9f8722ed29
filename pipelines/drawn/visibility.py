"""Which keypoints of a painted person the person's own body leaves to be seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hrnet_core.skeleton import COCO17
from pipelines.drawn.body import Array
from pipelines.drawn.brush import PART, PARTS, Canvas

TURNED_AWAY, HIDDEN, VISIBLE = 0, 1, 2
"""Of a keypoint: COCO's v, as far as the own body decides it."""
# Parts that a keypoint lies in: it is visible where one of them is seen at its pixel.
OWN_PARTS = {
    "nose": ("head",),
    "eye": ("head",),
    "ear": ("ear",),
    "shoulder": ("torso", "upper_arm"),
    "elbow": ("upper_arm", "forearm"),
    "wrist": ("forearm", "hand"),
    "hip": ("torso", "thigh", "skirt"),
    "knee": ("thigh", "shank"),
    "ankle": ("shank", "foot"),
}
# How far, in statures, the seen surface may lie in front of the keypoint: more means a body in between.
DEPTH_REACH = {"nose": 0.03, "eye": 0.03, "ear": 0.05, "shoulder": 0.09, "hip": 0.105}


def _own_table() -> NDArray[np.bool_]:
    """(17, parts + 1): may this part be seen where this keypoint is visible?"""
    table = np.zeros((17, len(PARTS) + 1), bool)
    for row, keypoint in enumerate(COCO17.keypoints):
        side, _, name = keypoint.rpartition("_")
        for part in OWN_PARTS[name]:
            table[row, PART.get(part, 0) or PART[f"{side}_{part}"]] = True
    return table


OWN_TABLE = _own_table()
REACH = np.array([DEPTH_REACH.get(name.rpartition("_")[2], 0.075) for name in COCO17.keypoints], np.float32)
# Where nose, eyes and ears look in head axes, and how little towards us counts as turned away.
OUTWARD = np.array(
    [(0, 0, 1), (0.3, 0, 0.954), (-0.3, 0, 0.954), (0.98, 0, -0.2), (-0.98, 0, -0.2)], np.float32
)
OUTWARD_LIMIT = np.array([-0.05, 0.0, 0.0, -0.15, -0.15], np.float32)


def self_visibility(canvas: Canvas, keypoints: Array, head: Array, scale: float) -> NDArray[np.int64]:
    """int64 (17,): VISIBLE, HIDDEN by the own body, TURNED_AWAY for the far side of a face.

    keypoints (17, 3) px, head (3, 3) its axes on the canvas, scale px per stature.
    """
    inside, pixel = pixels_of(keypoints, canvas.part.shape, (canvas.left, canvas.top))
    part, gap = canvas.part[pixel], canvas.depth[pixel] - keypoints[:, 2]
    visible = inside & OWN_TABLE[np.arange(17), part] & (gap < REACH * scale)
    seen = np.where(visible, VISIBLE, HIDDEN)
    away = (OUTWARD @ head.T)[:, 2] < OUTWARD_LIMIT
    seen[:5][away & ~visible[:5]] = TURNED_AWAY
    return seen


def pixels_of(
    keypoints: Array, shape: tuple[int, int], corner: tuple[int, int] = (0, 0)
) -> tuple[NDArray[np.bool_], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Where keypoints (n, 2 or more) in px lie on an array of `shape` whose top left pixel is at `corner`
    (x, y): whether inside it, (n,), and rows and columns of their pixels, or of the nearest ones, (n,)."""
    height, width = shape
    column, row = (np.rint(keypoints[:, :2]).astype(int) - corner).T
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return inside, (np.clip(row, 0, height - 1), np.clip(column, 0, width - 1))
