"""Whom evaluate asks about, and what they are scored against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.skeleton import Skeleton
from pipelines.settings.config import EvaluateSettings
from pipelines.sources.annotations import Wanted
from pipelines.sources.coco import read_coco
from pipelines.sources.detections import read_detections
from pipelines.sources.doubts import doubts_of, refuse_misread, refuse_misread_boxes, seen_of
from pipelines.sources.records import People, Photo, Split
from pipelines.storage.files import base_name, sha256_of


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Whom to predict, and what they are scored against: all of one reading of the annotations."""

    split: Split
    """The photographs and their labelled people."""
    asked: People
    """The people to predict: the labelled ones, or a detector's boxes."""
    left_out: tuple[str, ...] = ()
    """The reason of each annotation or box that is not predicted."""
    boxes: tuple[str, str] | None = None
    """Name and sha256 of the detector's file; None: ground truth."""
    doubts: Mapping[str, int] = field(default_factory=dict)
    """Of how many people each kind looks wrong (doubts.py)."""

    @property
    def photos(self) -> list[tuple[Photo, slice]]:
        """Photographs that are asked about, by image_id, and their rows in `asked`."""
        return list(replace(self.split, people=self.asked).by_photo())


def read_evaluation_set(
    coco_root: str | Path,
    split: str,
    boxes: str | Path | None,
    settings: EvaluateSettings,
    skeleton: Skeleton,
    checkpoint: str = "the checkpoint",
) -> EvaluationSet:
    """The split's people, or the detector's boxes on its photographs; all may lie in a bucket.

    A person whose annotation is unusable is left out of the prediction (as published) and stays in the
    ground truth: it counts as missed. DataError: annotations of another skeleton, people whose keypoints or
    area cannot be read, pictures that are missing (both listed), nobody to predict.
    """
    way_out = f"evaluate on annotations of the skeleton that {checkpoint} was trained for"
    labelled = read_coco(
        coco_root, split, skeleton, Wanted(True, way_out, settings.category, "--evaluate.category")
    )
    labelled.truth.refuse_unscorable()
    doubts = doubts_of(seen_of(labelled), skeleton, settings.coordinates_checked)
    refuse_misread(labelled.annotation_file, doubts)
    told = {doubt.kind: int(doubt.who.sum()) for doubt in doubts}
    refuse_unusable([(r.file, f"{r.reason}, {r.detail}") for r in labelled.rejected if r.ann_id is None])
    if boxes is not None:
        asked, rejected = read_detections(boxes, labelled, settings.score_threshold, settings.boxes_category)
        if len(asked):
            refuse_misread_boxes(str(boxes), seen_of(labelled, asked), "--boxes")
        detector = base_name(str(boxes)), sha256_of(boxes)
        return EvaluationSet(labelled, asked, tuple(r.reason for r in rejected), detector, told)
    asked = labelled.people
    if settings.preset == "mmpose":
        asked = replace(asked, bbox_xywh=_mmpose_boxes(labelled))
    if not len(asked):
        raise DataError(
            f"{labelled.annotation_file}: no person with keypoints and a box, nothing to evaluate."
            + "".join(f" The first: {r.file}, {r.reason}, {r.detail}." for r in labelled.rejected[:1])
        )
    return EvaluationSet(labelled, asked, tuple(r.reason for r in labelled.rejected), doubts=told)


def _mmpose_boxes(split: Split) -> NDArray[np.float32]:
    """(N, 4) ground-truth boxes by mmpose's rule: both corners clipped to the image, no pixel taken off the
    size (base_coco_style_dataset.py:283-290)."""
    last = split.sizes_of(split.people) - 1
    start, size = split.people.stated_xywh[:, :2], split.people.stated_xywh[:, 2:]
    low, high = np.clip(start, 0, last), np.clip(start + size, 0, last)
    return np.concatenate([low, high - low], axis=1).astype(np.float32)


def refuse_unusable(problems: Sequence[tuple[str, str]]) -> None:
    """DataError with the photographs (file, why) that cannot be used: without them the AP would be
    another's."""
    if not problems:
        return
    listed = "; ".join(f"{file}: {why}" for file, why in problems[:10])
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    raise DataError(
        f"{len(problems)} photographs cannot be used, so its AP would not be comparable: "
        f"{listed}{more}. Mend what is said of each (copy again what is missing or damaged), or take "
        f"them and their annotations out of the set."
    )
