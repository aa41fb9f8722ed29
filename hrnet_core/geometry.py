"""Boxes, crops and the matrices between image px and crop px.

Pixel (0, 0) is the centre of the top-left pixel in every space. All functions take any leading shape,
compute in float64 and change none of their inputs. Which of the two crop matrices a model wants is
its codec's business: ask `HeatmapCodec.image_to_crop_matrix`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrnet_core.choices import PADDING

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]
FARTHEST = 1e6
"""px: no box of a photograph has such a coordinate, and OpenCV's fixed point ends not far above."""


def sanitize_boxes(bbox_xywh: ArrayLike, width: ArrayLike, height: ArrayLike) -> tuple[Float32, NDArray[Any]]:
    """Ground-truth boxes as the published training and evaluation used them (official coco.py:161-172).

    One pixel is taken off width and height, then the box is clipped to [0, W - 1] x [0, H - 1].
    Detector and request boxes are never sent through here.

    bbox_xywh (..., 4) in image px; width, height of the image, scalars or (...,).
    Returns boxes float32 (..., 4) and keep bool (...,): False where nothing of the box is inside the
    image, where it has neither width nor height (no crop could be made of it), or for NaN. The reference
    also wants the annotation's own `area` > 0; whoever reads annotations checks that.
    """
    x, y, w, h = np.moveaxis(np.asarray(bbox_xywh, np.float64), -1, 0)
    x1, y1 = np.maximum(x, 0), np.maximum(y, 0)
    x2 = np.minimum(np.asarray(width) - 1, x1 + np.maximum(w - 1, 0))
    y2 = np.minimum(np.asarray(height) - 1, y1 + np.maximum(h - 1, 0))
    boxes = np.stack([x1, y1, x2 - x1, y2 - y1], axis=-1)
    keep = (x2 >= x1) & (y2 >= y1) & ((x2 > x1) | (y2 > y1))
    return boxes.astype(np.float32), keep


def box_to_center_scale(
    bbox_xywh: ArrayLike, input_size: tuple[int, int], padding: float = PADDING
) -> tuple[Float32, Float32]:
    """Boxes (..., 4) in image px -> center float32 (..., 2), scale float32 (..., 2), both in image px.

    The shorter side is widened to the aspect of input_size (width, height), then both are multiplied by
    `padding` (official coco.py:214-229, whose scale is in units of 200 px; ours never is).
    """
    x, y, w, h = np.moveaxis(np.asarray(bbox_xywh, np.float64), -1, 0)
    aspect = input_size[0] / input_size[1]
    center = np.stack([x + w * 0.5, y + h * 0.5], axis=-1)
    scale = np.stack([np.maximum(w, h * aspect), np.maximum(h, w / aspect)], axis=-1) * padding
    return center.astype(np.float32), scale.astype(np.float32)


def three_point_matrix(
    center: ArrayLike, scale: ArrayLike, input_size: tuple[int, int], rotation_deg: ArrayLike = 0.0
) -> Float64:
    """image_to_crop of the `official` and `dark` codecs, float64 (..., 2, 3).

    The published code solves it from three points (official transforms.py:57-110): the center goes to
    (W / 2, H / 2) and the box width alone sets the one factor W / w; the box height plays no part. A
    positive angle has +sin in the first row.
    """
    (cx, cy), (w, _), cos, sin = _parts(center, scale, rotation_deg)
    factor = input_size[0] / w
    a, b = factor * cos, factor * sin
    x, y = input_size[0] * 0.5 - (a * cx + b * cy), input_size[1] * 0.5 - (a * cy - b * cx)
    return _matrix((a, b, x), (-b, a, y))


def udp_matrix(
    center: ArrayLike, scale: ArrayLike, input_size: tuple[int, int], rotation_deg: ArrayLike = 0.0
) -> Float64:
    """image_to_crop of the `udp` codec, float64 (..., 2, 3) (arXiv:1911.07524, section 3.2; mmpose
    structures/bbox/transforms.py:325-369).

    Lengths are counted between pixel centres: factors (W - 1) / w and (H - 1) / h. For the same angle it
    turns the other way than `three_point_matrix`, as published.
    """
    (cx, cy), (w, h), cos, sin = _parts(center, scale, rotation_deg)
    fx, fy = (input_size[0] - 1) / w, (input_size[1] - 1) / h
    return _matrix(
        (fx * cos, -fx * sin, fx * (0.5 * w - cos * cx + sin * cy)),
        (fy * sin, fy * cos, fy * (0.5 * h - sin * cx - cos * cy)),
    )


def _parts(center: ArrayLike, scale: ArrayLike, rotation_deg: ArrayLike) -> tuple[Any, Any, Float64, Float64]:
    angle = np.deg2rad(np.asarray(rotation_deg, np.float64))
    xy = np.moveaxis(np.asarray(center, np.float64), -1, 0)
    wh = np.moveaxis(np.asarray(scale, np.float64), -1, 0)
    return xy, wh, np.cos(angle), np.sin(angle)


def _matrix(row0: tuple[Any, Any, Any], row1: tuple[Any, Any, Any]) -> Float64:
    values = np.stack(np.broadcast_arrays(*row0, *row1), axis=-1)
    return values.reshape(*values.shape[:-1], 2, 3)


def invert_affine(matrix: ArrayLike) -> Float64:
    """float64 (..., 2, 3) of the way back: image_to_crop -> crop_to_image."""
    matrix = np.asarray(matrix, np.float64)
    (a, b, tx), (c, d, ty) = np.moveaxis(matrix, (-2, -1), (0, 1))
    determinant = a * d - b * c
    ia, ib, ic, id_ = d / determinant, -b / determinant, -c / determinant, a / determinant
    return _matrix((ia, ib, -(ia * tx + ib * ty)), (ic, id_, -(ic * tx + id_ * ty)))


def compose_affine(outer: ArrayLike, inner: ArrayLike) -> Float64:
    """float64 (..., 2, 3) that applies `inner` first, then `outer`; leading shapes broadcast."""
    outer, inner = np.asarray(outer, np.float64), np.asarray(inner, np.float64)
    result: Float64 = outer[..., :2] @ inner
    result[..., 2] += outer[..., 2]
    return result


def apply_affine(matrix: ArrayLike, points: ArrayLike) -> Float32:
    """matrix (..., 2, 3) on points (..., K, 2) -> float32 (..., K, 2); computed in float64."""
    matrix, points = np.asarray(matrix, np.float64), np.asarray(points, np.float64)
    moved: Float64 = points @ np.swapaxes(matrix[..., :2], -1, -2) + matrix[..., None, :, 2]
    return moved.astype(np.float32)


def crop_people(image: UInt8, image_to_crop: ArrayLike, input_size: tuple[int, int]) -> UInt8:
    """image uint8 (H, W, 3), image_to_crop (P, 2, 3) -> crops uint8 (P, h, w, 3).

    Bilinear, black outside the image, as the published code (cv2.warpAffine); input_size is (w, h).
    """
    matrices = np.asarray(image_to_crop, np.float64)
    width, height = input_size
    crops = np.empty((len(matrices), height, width, 3), np.uint8)
    # One call a person: warpAffine takes one matrix, and does not hold the interpreter while it works.
    for matrix, crop in zip(matrices, crops, strict=True):
        cv2.warpAffine(image, matrix, (width, height), dst=crop, flags=cv2.INTER_LINEAR)
    return crops


class PhotoCuts(NamedTuple):
    """Axis-aligned cuts of photos (`cut_around`); every field has the leading shape of its input."""

    box: NDArray[np.int64]
    """(..., 4): x0, y0, x1, y1 in photo px, whole pixels, the ends not included."""
    size: NDArray[np.int64]
    """(..., 2): width and height of the picture made of it."""
    image_to_picture: Float64
    """(..., 2, 3)"""


def cut_around(center: ArrayLike, side: ArrayLike, image_size: ArrayLike, largest: int) -> PhotoCuts:
    """Squares of `side` (...,) around `center` (..., 2), in photo px, as far as the photo reaches.

    image_size (..., 2): width and height of the photo. A cut keeps the photo's pixels as they are; one
    with more than `largest` px on a side is made smaller as a whole, to fit.
    """
    center, half = np.asarray(center, np.float64), np.asarray(side, np.float64)[..., None] / 2
    limit = np.asarray(image_size, np.int64)
    first = np.clip(np.floor(center - half), 0, limit - 1).astype(np.int64)
    last = np.clip(np.ceil(center + half), first, limit - 1).astype(np.int64)
    extent = last + 1 - first
    shrink = np.minimum(1, largest / extent.max(axis=-1, keepdims=True))
    size = np.maximum(1, np.rint(extent * shrink)).astype(np.int64)
    factor = size / extent
    matrix = np.zeros((*factor.shape, 3))
    matrix[..., 0, 0], matrix[..., 1, 1] = factor[..., 0], factor[..., 1]
    # Edges meet, not the centres of the outermost pixels: that is how cv2.resize makes a picture smaller.
    matrix[..., 2] = (0.5 - first) * factor - 0.5
    return PhotoCuts(np.concatenate([first, last + 1], axis=-1), size, matrix)


def cut_photo(image: UInt8, box: ArrayLike, size: ArrayLike) -> UInt8:
    """One cut of `cut_around`: image uint8 (H, W, 3), box (4,), size (2,) -> uint8 (h, w, 3)."""
    x0, y0, x1, y1 = (int(edge) for edge in np.asarray(box))
    width, height = (int(side) for side in np.asarray(size))
    cut = image[y0:y1, x0:x1]
    if cut.shape[:2] == (height, width):
        return np.ascontiguousarray(cut)
    smaller = np.empty((height, width, 3), np.uint8)
    cv2.resize(cut, (width, height), dst=smaller, interpolation=cv2.INTER_AREA)
    return smaller


def place_in_image(keypoints: ArrayLike, image_to_crop: ArrayLike) -> Float32:
    """keypoints (P, K, 2) in crop px, image_to_crop (P, 2, 3) -> float32 (P, K, 2) in image px."""
    return apply_affine(invert_affine(image_to_crop), keypoints)
