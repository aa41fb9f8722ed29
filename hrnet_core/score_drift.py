"""How far the scores of keypoints have moved from those of an evaluation: the population stability index.

    PSI = sum over buckets of (found - expected) ln(found / expected), both as shares

from N. Siddiqi, Credit Risk Scorecards (Wiley, 2006), with the thresholds that are in use since: below
LITTLE nothing has moved, from MUCH on it is another population. It is the symmetric Kullback-Leibler
divergence (Jeffreys). Chance alone gives about (buckets - 1) (1 / found + 1 / expected) of independent scores
(B. Yurdakul, Statistical Properties of Population Stability Index, 2018). Keypoints of a person are not
independent: count people rather than keypoints there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SCORE_BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Upper bounds of the buckets, inclusive; a last one takes what is above."""
LITTLE, MUCH = 0.1, 0.25


def score_counts(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 (buckets,): how many of the scores (any shape) lie in each bucket."""
    places = np.searchsorted(np.array(SCORE_BOUNDS, np.float32), scores.ravel())
    return np.bincount(places, minlength=len(SCORE_BOUNDS) + 1)


def stability_index(expected: Sequence[int] | NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """The PSI of two counts (buckets,). Half a score is added to each bucket, else one that is empty on one
    side would make it infinite. ValueError where the buckets are not those of SCORE_BOUNDS."""
    buckets = len(SCORE_BOUNDS) + 1
    if not len(expected) == len(found) == buckets:
        raise ValueError(f"{buckets} counts wanted on both sides, got {len(expected)} and {len(found)}.")
    counts = np.array([expected, found], np.float64)
    shares = (counts + 0.5) / (counts + 0.5).sum(axis=1, keepdims=True)
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
