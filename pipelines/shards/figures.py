"""Figures of a dataset from its small columns, a row group at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrnet_core.geometry import box_to_center_scale
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_rows, read_row_group

SMALL_COLUMNS = (
    "image_id", "keypoints", "weights", "bbox_xywh", "area", "scale", "rotation_deg", "flipped",
)  # fmt: skip
"""What the figures are made of: everything but pictures and heatmaps, which are 99 % of the bytes."""
AREAS = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}
"""COCO's classes of people by the area of their segment, each from this many px^2 on."""
QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95}
LENGTHS = np.geomspace(1, 20_000, 501)
"""Edges for box sides in px: 2 % apart."""
ANGLES = np.linspace(-180, 180, 181)
FACTORS = np.geomspace(0.1, 10, 233)
"""Edges for the scale of a view against the plain one: 2 % apart."""


class Histogram:
    """Counts between fixed edges; what lies outside counts in the outermost bins."""

    def __init__(self, edges: ArrayLike) -> None:
        self.edges = np.asarray(edges, np.float64)
        self.counts = np.zeros(len(self.edges) - 1, np.int64)
        self._least, self._most = np.inf, -np.inf

    def add(self, values: ArrayLike) -> None:
        numbers = np.asarray(values, np.float64)
        self._least = min(self._least, numbers.min(initial=np.inf))
        self._most = max(self._most, numbers.max(initial=-np.inf))
        self.counts += np.histogram(numbers.clip(self.edges[0], self.edges[-1]), self.edges)[0]

    def quantile(self, share: float) -> float:
        """Within a bin's width of the values' own quantile; 0 without values."""
        below = np.concatenate([[0], np.cumsum(self.counts)])
        place = np.interp(share * below[-1], below, self.edges)
        return float(np.clip(place, self._least, self._most)) if below[-1] else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The bins that hold something: `edges`, one more than `counts`."""
        some = np.flatnonzero(self.counts)
        if not len(some):
            return {"edges": [], "counts": []}
        first, end = int(some[0]), int(some[-1]) + 1
        edges = [float(f"{edge:.4g}") for edge in self.edges[first : end + 1]]
        return {"edges": edges, "counts": self.counts[first:end].tolist()}


@dataclass
class ViewFigures:
    """Of one stored view of all people of a split."""

    rows: int = 0
    """One of each person."""
    flipped: int = 0
    rotated: int = 0
    labelled: int = 0
    """Keypoints with v > 0."""
    targets: int = 0
    """Of those, the ones with a heatmap: the others lie outside the view."""
    rotation: Histogram = field(default_factory=lambda: Histogram(ANGLES))
    """Degrees, of the rotated ones."""
    zoom: Histogram = field(default_factory=lambda: Histogram(FACTORS))
    """Scale of the view over that of the plain one: 1 for the plain one, 0.5 where half of it is seen."""


@dataclass
class SplitFigures:
    """Of the people of a split, from their plain view; and of each view."""

    visibility: NDArray[np.int64]
    """(K, 3): people whose keypoint is not labelled, hidden, seen."""
    labelled: NDArray[np.int64]
    """(K + 1,): people with so many labelled keypoints."""
    views: list[ViewFigures]
    crowding: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    """Photos with so many people in the dataset; grows as needed."""
    heights: Histogram = field(default_factory=lambda: Histogram(LENGTHS))
    widths: Histogram = field(default_factory=lambda: Histogram(LENGTHS))
    areas: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AREAS, 0))


def figures_of(manifest: Manifest, split: str) -> SplitFigures:
    """Figures of all rows of a split, added up a row group at a time."""
    num_keypoints = manifest.recipe.skeleton.num_keypoints
    figures = SplitFigures(
        np.zeros((num_keypoints, 3), np.int64),
        np.zeros(num_keypoints + 1, np.int64),
        [ViewFigures() for _ in range(manifest.variants(split))],
    )
    for index, shard in enumerate(manifest.shards(split)):
        image_ids = []  # a photo's people share a shard, not always a row group
        for group in range(len(shard.row_groups)):
            for variant, view in enumerate(figures.views):
                table = read_row_group(manifest, split, index, group, SMALL_COLUMNS, variant)
                rows = decode_rows(table, manifest)
                _add_view(view, rows, manifest)
                if variant == 0:
                    _add_people(figures, rows)
                    image_ids.append(rows["image_id"])
        people = np.unique(np.concatenate(image_ids), return_counts=True)[1]
        counts = np.bincount(people, minlength=len(figures.crowding))
        counts[: len(figures.crowding)] += figures.crowding
        figures.crowding = counts
    return figures


def _add_view(view: ViewFigures, rows: dict[str, NDArray[Any]], manifest: Manifest) -> None:
    settings = manifest.recipe.settings
    plain = box_to_center_scale(rows["bbox_xywh"], settings.input_size, settings.padding)[1]
    view.rows += len(rows["flipped"])
    view.flipped += int(rows["flipped"].sum())
    view.rotated += int((rows["rotation_deg"] != 0).sum())
    view.labelled += int((rows["keypoints"][..., 2] > 0).sum())
    view.targets += int((rows["weights"] > 0).sum())
    view.rotation.add(rows["rotation_deg"][rows["rotation_deg"] != 0])
    view.zoom.add(rows["scale"][:, 1] / plain[:, 1])


def _add_people(figures: SplitFigures, rows: dict[str, NDArray[Any]]) -> None:
    visible = rows["keypoints"][..., 2]
    figures.visibility += np.stack([(visible == v).sum(axis=0) for v in (0, 1, 2)], axis=1)
    figures.widths.add(rows["bbox_xywh"][:, 2])
    figures.heights.add(rows["bbox_xywh"][:, 3])
    figures.labelled += np.bincount((visible > 0).sum(axis=1), minlength=len(figures.labelled))
    classes = np.searchsorted(list(AREAS.values()), rows["area"], side="right") - 1
    for name, count in zip(AREAS, np.bincount(classes.clip(0), minlength=len(AREAS)).tolist(), strict=True):
        figures.areas[name] += count
