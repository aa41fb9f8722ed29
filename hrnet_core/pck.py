"""PCK: the share of a keypoint's predictions that lie near enough to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pck(
    truth: ArrayLike, predicted: ArrayLike, visible: ArrayLike, boxes: ArrayLike, threshold: float = 0.05
) -> NDArray[np.float64]:
    """float64 (K,): of each keypoint, the share of people for whom it lies within threshold x the longer side
    of their box; NaN for one that nobody has. Keypoints that are not labelled do not count.

    truth, predicted: (P, K, 2) px. visible: (P, K), COCO's 0/1/2. boxes: (P, 4), x, y, w, h px. The longer
    side is Yang and Ramanan's (PAMI 2013); it and .05 are the defaults of mmpose's PCKAccuracy.
    """
    far = np.linalg.norm(np.subtract(predicted, truth, dtype=np.float64), axis=-1)
    near = far <= threshold * np.asarray(boxes, np.float64)[:, 2:].max(axis=-1, keepdims=True)
    labelled = np.asarray(visible) > 0
    shares: NDArray[np.float64] = np.full(labelled.shape[-1], np.nan)
    counts = labelled.sum(axis=0)
    np.divide((near & labelled).sum(axis=0), counts, out=shares, where=counts > 0)
    return shares
