"""Object keypoint similarity, the suppression of double poses that uses it, and the score of a pose.

All of it in float64: with equal or nearly equal scores the rounding of a float32 mean changes the
order of poses and with it the AP (by up to 0.002 on MMPose's test set).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]


def oks(
    keypoints_a: ArrayLike,
    keypoints_b: ArrayLike,
    area: ArrayLike,
    oks_sigmas: ArrayLike,
    weights: ArrayLike | None = None,
) -> Float64:
    """keypoints_a, keypoints_b (..., K, 2) in one space, area (...) in its px² -> OKS float64 (...), 0 to 1.

    mean over K of exp(-d² / (2 area (2 sigma)²)), as pycocotools' computeOks. For truth against a pose give
    the truth's area and its visibility as `weights` (..., K): whatever is above 0 counts, and all alike. For
    two poses (official nms.py:75-95) `area` is the mean of both areas, and all K keypoints count.
    Where no keypoint counts OKS is 0. Leading shapes broadcast.
    """
    difference = np.asarray(keypoints_a, np.float64) - np.asarray(keypoints_b, np.float64)
    variances = (2 * np.asarray(oks_sigmas, np.float64)) ** 2
    size = np.asarray(area, np.float64)[..., None] + np.spacing(1)
    similarity = np.exp(-(difference**2).sum(axis=-1) / (2 * variances * size))
    counts = np.ones_like(similarity) if weights is None else np.asarray(weights) > 0
    counted: Float64 = np.sum(similarity * counts, axis=-1) / np.maximum(np.sum(counts, axis=-1), 1)
    return counted


def oks_nms(
    keypoints: ArrayLike, scores: ArrayLike, areas: ArrayLike, oks_sigmas: ArrayLike, threshold: float = 0.9
) -> Indices:
    """keypoints (P, K, 2), scores (P,), areas (P,) of one image -> indices int64 of the kept, best first.

    The best pose stays, all whose OKS with it is above `threshold` go, and so on (official nms.py:98-124).
    Equal scores: the earlier row goes first.
    """
    keypoints, areas = np.asarray(keypoints, np.float64), np.asarray(areas, np.float64)
    order = _best_first(np.asarray(scores, np.float64))
    kept: list[int] = []
    while len(order):
        best, others = order[0], order[1:]
        kept.append(best)
        order = others[_similarity(keypoints, areas, best, others, oks_sigmas) <= threshold]
    return np.array(kept, np.int64)


def soft_oks_nms(
    keypoints: ArrayLike,
    scores: ArrayLike,
    areas: ArrayLike,
    oks_sigmas: ArrayLike,
    threshold: float = 0.9,
    max_keep: int = 20,
) -> Indices:
    """As oks_nms, but a pose near a kept one loses score, by exp(-OKS² / threshold), instead of going;
    the first `max_keep` of that order are kept (official nms.py:138-177). The scores serve the order only.
    """
    keypoints, areas = np.asarray(keypoints, np.float64), np.asarray(areas, np.float64)
    scores = np.array(scores, np.float64)
    order = _best_first(scores)
    kept: list[int] = []
    while len(order) and len(kept) < max_keep:
        best, others = order[0], order[1:]
        kept.append(best)
        similarity = _similarity(keypoints, areas, best, others, oks_sigmas)
        scores[others] *= np.exp(-(similarity**2) / threshold)
        order = others[_best_first(scores[others])]
    return np.array(kept, np.int64)


def rescore(keypoint_scores: ArrayLike, box_scores: ArrayLike, threshold: float = 0.2) -> Float64:
    """keypoint_scores (P, K), box_scores (P,) -> float64 (P,): the score of a pose in a COCO result.

    The box's score times the mean of the keypoint scores above `threshold`, or 0 if there is none
    (official coco.py:326-340).
    """
    values = np.asarray(keypoint_scores, np.float64)
    counts = values > threshold
    mean = np.sum(values * counts, axis=-1) / np.maximum(np.sum(counts, axis=-1), 1)
    rescored: Float64 = mean * np.asarray(box_scores, np.float64)
    return rescored


def _best_first(scores: Float64) -> NDArray[Any]:
    return np.argsort(-scores, kind="stable")


def _similarity(
    keypoints: Float64, areas: Float64, one: int, others: NDArray[Any], oks_sigmas: ArrayLike
) -> Float64:
    """OKS of one pose with the others, (len(others),)."""
    return oks(keypoints[one], keypoints[others], (areas[one] + areas[others]) / 2, oks_sigmas)
