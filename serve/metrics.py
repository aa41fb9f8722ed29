"""Prometheus series of a replica, exported by Ray on each node's metrics port with a ray_ prefix.

Ray's own histograms forget what was observed: its agent gets the counts of the buckets and adds up their
midpoints, so that a sum over them is wrong by up to a bucket's width. Those here are kept in the replica and
shown as the gauges that a Prometheus histogram consists of: NAME_bucket (le), NAME_sum, NAME_count.

Ray's agent forgets a gauge that it was not told of for twenty seconds. So all are told with each of Serve's
health checks, every ten seconds, whether they have changed or not.
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
# How often Ray is told. It hands on what it has every ten seconds.
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
        # Ray's types have tuple[str] for labels: one.
        what = f"{description} Up to le, since the start."
        self._bucket = Gauge(f"{name}_bucket", what, ("le", *labels))  # type: ignore[arg-type]
        what = f"{description} Their sum since the start."
        self._sum = Gauge(f"{name}_sum", what, labels)  # type: ignore[arg-type]
        what = f"{description} Their number since the start."
        self._count = Gauge(f"{name}_count", what, labels)  # type: ignore[arg-type]

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

    def show(self, everything: bool = False) -> None:
        """Set the gauges of what has changed, or of everything."""
        for values in self._series if everything else self._changed:
            series, tags = self._series[values], dict(zip(self.labels, values, strict=True))
            seen = 0
            for bound, count in zip(self.bounds, series.counts, strict=True):
                seen += count
                le = "+Inf" if bound == math.inf else f"{bound:g}"
                self._bucket.set(seen, tags={"le": le, **tags})
            self._sum.set(series.total, tags=dict(tags))
            self._count.set(seen, tags=dict(tags))
        self._changed.clear()


class Counts:
    """A counter that Ray is told of once a second: each call of its own costs as much as the rest of what is
    counted of a request."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self._counter = Counter(name, description, labels)  # type: ignore[arg-type]  # as above
        self._new: dict[tuple[str, ...], int] = {}

    def add(self, more: int, *labels: str) -> None:
        self._new[labels] = self._new.get(labels, 0) + more

    def show(self) -> None:
        """Tell Ray what has come since the last time."""
        new, self._new = self._new, {}
        for values, count in new.items():
            if count:  # Ray's counters refuse 0
                self._counter.inc(count, tags=dict(zip(self.labels, values, strict=True)))


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
        labels = ("path", "status", "slug", "key", *MODEL)
        self.requests = Counts("hrnet_requests", "Requests ended.", labels)
        self.refused = Counts("hrnet_refused", "Requests refused with 429.", ("reason", "key"))
        self.people = Counts("hrnet_people", "People whose keypoints were found.", MODEL)
        self.pixels = Counts("hrnet_decoded_pixels", "Pixels of pictures that were decoded.", MODEL)
        self.seconds = Sums(
            "hrnet_request_seconds", "Seconds of a request that was answered.", SECONDS, ("path", *MODEL)
        )
        stages = "Seconds of an answered request by stage: read, decode, detect, queue, infer."
        self.stages = Sums("hrnet_stage_seconds", stages, SECONDS, ("stage", *MODEL))
        self.scores = Sums("hrnet_keypoint_score", "Scores of all keypoints.", SCORE_BOUNDS, MODEL)
        self.drift = Drift()
        self.looked = Counts("hrnet_detector_pictures", "Pictures the detector looked at.", ("detector",))
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
        self.requests.add(1, outcome.path, str(outcome.status), outcome.slug, outcome.key, *model)
        if outcome.reason and outcome.status == 429:
            self.refused.add(1, outcome.reason, outcome.key)
        if outcome.status == 200 and outcome.stages:
            self.seconds.observe(outcome.seconds, outcome.path, *model)
            for stage, seconds in outcome.stages.items():
                self.stages.observe(max(seconds, 0.0), stage, *model)

    def found(self, scores: NDArray[np.float32], pixels: int, model: ModelInfo) -> None:
        """Count the work on a request. scores: (P, K) of its people's keypoints."""
        if people := len(scores):
            self.people.add(people, model.version, model.mode)
            self.scores.observe_all(scores, model.version, model.mode)
            self.drift.found(scores, model.version)
        self.pixels.add(pixels, model.version, model.mode)

    def detected(self, detector: PersonDetector, pictures: int, seconds: float) -> None:
        """Count a run of the detector."""
        name = detector.sha256[:12]
        self.looked.add(pictures, name)
        self.runs.observe(seconds, name)

    def show(self, room: Room, at_once: bool = False) -> None:
        """Tell Ray what has changed, once a second at most; at_once (Serve's health checks) everything."""
        if not at_once and time.monotonic() - self._shown < SHOWN_EVERY_S:
            return
        self._shown = time.monotonic()
        counts = (room.in_progress, room.bodies, room.bytes_held, room.pixels.held, room.pixels.waiting)
        for gauge, count in zip(self._now.values(), counts, strict=True):
            gauge.set(count)
        counted = (self.requests, self.refused, self.people, self.pixels, self.looked)
        for counter in counted:
            counter.show()
        for histogram in (self.seconds, self.stages, self.scores, self.runs, self.batches):
            histogram.show(everything=at_once)
        self.drift.show()
