"""Prometheus series of a replica, exported by Ray on each node's metrics port with a ray_ prefix.

Ray's own histograms forget what was observed: its agent gets the counts of the buckets and adds up their
midpoints, so that a sum over them is wrong by up to a bucket's width. Those here are kept in the replica and
shown as the gauges that a Prometheus histogram consists of: NAME_bucket (le), NAME_sum, NAME_count.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ray.serve.metrics import Counter, Gauge

from hrnet_core.score_drift import SCORE_BOUNDS
from serve.drift import Drift
from serve.room import Room
from serve.schemas import ModelInfo

if TYPE_CHECKING:
    from hrnet_core.detector import PersonDetector

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
PEOPLE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODEL = ("version", "mode")
# How often gauges are set. Ray takes them every ten seconds.
SHOWN_EVERY_S = 1.0


@dataclass
class _Series:
    """A histogram of one set of labels."""

    counts: list[int]
    """Observations by bucket, the last one beyond all bounds."""
    total: float = 0.0


class Sums:
    """A histogram whose sum is the sum of what was observed."""

    def __init__(self, name: str, description: str, bounds: Sequence[float], labels: tuple[str, ...]) -> None:
        self.bounds = (*bounds, math.inf)
        self.labels = labels
        self._series: dict[tuple[str, ...], _Series] = {}
        self._changed: set[tuple[str, ...]] = set()
        self._bucket = Gauge(f"{name}_bucket", f"{description} Up to le, since the start.", ("le", *labels))
        self._sum = Gauge(f"{name}_sum", f"{description} Their sum since the start.", labels)
        self._count = Gauge(f"{name}_count", f"{description} Their number since the start.", labels)

    def observe(self, value: float, *labels: str) -> None:
        series = self._series.setdefault(labels, _Series([0] * len(self.bounds)))
        series.counts[bisect_left(self.bounds, value)] += 1
        series.total += value
        self._changed.add(labels)

    def observe_all(self, values: NDArray[np.float32], *labels: str) -> None:
        """observe, of each of the values (any shape)."""
        series = self._series.setdefault(labels, _Series([0] * len(self.bounds)))
        places = np.searchsorted(self.bounds, values.ravel())
        for place, count in zip(*np.unique(places, return_counts=True), strict=True):
            series.counts[place] += int(count)
        series.total += float(values.sum(dtype=np.float64))
        self._changed.add(labels)

    def show(self) -> None:
        """Set the gauges of what has changed."""
        for values in self._changed:
            series, tags = self._series[values], dict(zip(self.labels, values, strict=True))
            seen = 0
            for bound, count in zip(self.bounds, series.counts, strict=True):
                seen += count
                le = "+Inf" if bound == math.inf else f"{bound:g}"
                self._bucket.set(seen, tags={"le": le, **tags})
            self._sum.set(series.total, tags=dict(tags))
            self._count.set(seen, tags=dict(tags))
        self._changed.clear()


@dataclass
class Outcome:
    """What became of a request."""

    path: str
    """Of the route, not of the request: a series for each path that a stranger invents would have no end."""
    status: int
    seconds: float
    slug: str = ""
    """Of the problem it ended in."""
    reason: str = ""
    """What there was no room for."""
    key: str = ""
    """Name of who asked, where keys are asked for."""
    model: ModelInfo | None = None
    """That answered, or was to."""
    stages: dict[str, float] = field(default_factory=dict)


class Metrics:
    """All series of a replica."""

    def __init__(self) -> None:
        self.requests = Counter(
            "hrnet_requests", "Requests ended.", ("path", "status", "slug", "key", *MODEL)
        )
        self.refused = Counter("hrnet_refused", "Requests refused with 429.", ("reason", "key"))
        self.people = Counter("hrnet_people", "People whose keypoints were found.", MODEL)
        self.pixels = Counter("hrnet_decoded_pixels", "Pixels of pictures that were decoded.", MODEL)
        self.seconds = Sums(
            "hrnet_request_seconds", "Seconds of a request that was answered.", SECONDS, ("path", *MODEL)
        )
        stages = "Seconds of an answered request by stage: read, decode, detect, queue, infer."
        self.stages = Sums("hrnet_stage_seconds", stages, SECONDS, ("stage", *MODEL))
        self.scores = Sums("hrnet_keypoint_score", "Scores of all keypoints.", SCORE_BOUNDS, MODEL)
        self.drift = Drift()
        self.looked = Counter("hrnet_detector_pictures", "Pictures the detector looked at.", ("detector",))
        runs = "Seconds of a run of the detector."
        self.runs = Sums("hrnet_detector_seconds", runs, SECONDS, ("detector",))
        self.batches = Sums("hrnet_batch_people", "People of a forward pass.", PEOPLE, ())
        now = {
            "in_progress": "Requests that have a place.",
            "bodies_read": "Bodies being read.",
            "bytes_held": "Bytes of bodies in memory.",
            "pixels_held": "Pixels of pictures and people in memory.",
            "pixels_waiting": "Requests that wait for room for their pixels.",
        }
        self._now = {name: Gauge(f"hrnet_{name}", text) for name, text in now.items()}
        self._shown = -math.inf

    def ended(self, outcome: Outcome) -> None:
        """Count a request."""
        model = (outcome.model.version, outcome.model.mode) if outcome.model else ("", "")
        tags = {"path": outcome.path, "status": str(outcome.status), "slug": outcome.slug, "key": outcome.key}
        self.requests.inc(tags={**tags, **dict(zip(MODEL, model, strict=True))})
        if outcome.reason and outcome.status == 429:
            self.refused.inc(tags={"reason": outcome.reason, "key": outcome.key})
        if outcome.status == 200 and outcome.stages:
            self.seconds.observe(outcome.seconds, outcome.path, *model)
            for stage, seconds in outcome.stages.items():
                self.stages.observe(max(seconds, 0.0), stage, *model)

    def found(self, scores: NDArray[np.float32], pixels: int, model: ModelInfo) -> None:
        """Count the work on a request. scores: (P, K) of its people's keypoints."""
        people = len(scores)
        tags = {"version": model.version, "mode": model.mode}
        if people:  # Ray's counters refuse 0
            self.people.inc(people, tags=dict(tags))
            self.scores.observe_all(scores, model.version, model.mode)
            self.drift.found(scores, model.version)
        self.pixels.inc(pixels, tags=dict(tags))

    def detected(self, detector: PersonDetector, pictures: int, seconds: float) -> None:
        """Count a run of the detector."""
        name = detector.sha256[:12]
        self.looked.inc(pictures, tags={"detector": name})
        self.runs.observe(seconds, name)

    def show(self, room: Room, at_once: bool = False) -> None:
        """Set the gauges, once a second at most: after each request, and with Serve's health checks."""
        if not at_once and time.monotonic() - self._shown < SHOWN_EVERY_S:
            return
        self._shown = time.monotonic()
        counts = (room.in_progress, room.bodies, room.bytes_held, room.pixels.held, room.pixels.waiting)
        for gauge, count in zip(self._now.values(), counts, strict=True):
            gauge.set(count)
        for histogram in (self.seconds, self.stages, self.scores, self.runs, self.batches):
            histogram.show()
        self.drift.show()
