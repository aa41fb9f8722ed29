"""Whether the scores of keypoints are still those of the evaluation, as a gauge of a replica."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray
from ray.serve.metrics import Gauge

from hrnet_core.score_drift import score_counts, stability_index
from serve.settings import ModelChoice

BLOCK, BLOCKS = 1_000, 20
"""The last BLOCKS times BLOCK keypoints are looked at, a block coming and going at a time."""
LEAST = 5_000
"""Keypoints before anything is shown: of fewer, chance alone may give what looks like drift."""


class Drift:
    """hrnet_keypoint_score_drift of the version that answers, where its evaluation is known."""

    def __init__(self) -> None:
        what = "Population stability index of the last keypoints' scores against the evaluation's."
        self._gauge = Gauge("hrnet_keypoint_score_drift", what, ("version",))
        self._choice: ModelChoice | None = None
        self._begin(())

    def _begin(self, expected: tuple[int, ...]) -> None:
        self._expected = expected
        self._blocks: deque[NDArray[np.int64]] = deque(maxlen=BLOCKS)
        self._latest = score_counts(np.zeros(0, np.float32))
        self._shown = False

    def watch(self, choice: ModelChoice) -> None:
        """From now on the scores of this model. The gauge of the one before is 0: nobody watches it."""
        if choice == self._choice:
            return
        if self._choice and self._shown:
            self._gauge.set(0, tags={"version": self._choice.version})
        self._choice = choice
        self._begin(choice.expected_scores)

    def found(self, scores: NDArray[np.float32], version: str) -> None:
        """Count the scores (any shape) of an answer; those of another version are not looked at."""
        if not self._expected or not self._choice or version != self._choice.version:
            return
        self._latest = self._latest + score_counts(scores)
        if self._latest.sum() >= BLOCK:
            self._blocks.append(self._latest)
            self._latest = np.zeros_like(self._latest)

    def show(self) -> None:
        counts = sum(self._blocks, self._latest)
        if self._choice and self._expected and counts.sum() >= LEAST:
            self._shown = True
            self._gauge.set(stability_index(self._expected, counts), tags={"version": self._choice.version})
