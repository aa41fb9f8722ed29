"""Whom evaluate asks about, and what they are scored against."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import CheckpointError, DataError
from hrnet_core.locations import is_uri
from hrnet_core.skeleton import Skeleton
from pipelines.config import EvaluateSettings
from pipelines.sources.coco import read_coco
from pipelines.sources.detections import read_detections
from pipelines.sources.layout import annotations_of
from pipelines.sources.records import CocoSplit, Person, Photo
from pipelines.storage import read_json


@dataclass(frozen=True)
class People:
    """Whom to predict, and what they are scored against."""

    split: CocoSplit
    """With the boxes to predict, of the annotations or of a detector."""
    labelled: CocoSplit
    """With the annotations' people; the same as `split` for ground-truth boxes."""
    truth: dict[str, Any]
    """The whole annotation file, with crowds and people without keypoints."""
    boxes: tuple[str, str] | None = None
    """Name and sha256 of the detector's file; None: ground truth."""

    @property
    def photos(self) -> tuple[Photo, ...]:
        """Those with boxes, by image_id; their people are ordered by ann_id."""
        return tuple(photo for photo in self.split.photos if photo.people)


def read_people(
    coco_root: str | Path,
    split: str,
    boxes: str | Path | None,
    settings: EvaluateSettings,
    skeleton: Skeleton,
    checkpoint: str = "the checkpoint",
) -> People:
    """The split's people, or the detector's boxes on its photographs.

    A person whose annotation is unusable is left out of the prediction (as published) and stays in the
    ground truth: it counts as missed. A picture that is missing is refused: DataError lists them.
    """
    if is_uri(str(coco_root)):
        raise DataError(
            f"{coco_root}: evaluate reads photographs from a folder. Copy the split's files to one."
        )
    annotation_file = Path(annotations_of(coco_root, split))
    truth: dict[str, Any] = {}
    if annotation_file.is_file():  # else read_coco says what is wrong with the folder
        truth = read_json(annotation_file, "the annotations")[1]
        _check_skeleton(truth, annotation_file, skeleton, checkpoint)
    labelled = read_coco(coco_root, split, skeleton)
    lost = [(r.file, f"{r.reason}, {r.detail}") for r in labelled.rejected if r.ann_id is None]
    if lost:
        raise unusable_photos(lost)
    if boxes is None:
        if settings.preset == "mmpose":
            labelled = _mmpose_boxes(labelled, truth)
        if not labelled.people:
            raise DataError(f"{annotation_file}: no person with keypoints and a box, nothing to evaluate.")
        return People(labelled, labelled, truth)
    detected = read_detections(boxes, labelled, settings.score_threshold)
    return People(detected, labelled, truth, (Path(boxes).name, sha256_of_file(Path(boxes))))


def _check_skeleton(truth: Any, file: Path, skeleton: Skeleton, checkpoint: str) -> None:
    """CheckpointError unless the annotations' keypoints are those that the checkpoint was trained for."""
    categories = truth.get("categories") if isinstance(truth, dict) else None
    named = [c["keypoints"] for c in categories or () if isinstance(c, dict) and c.get("keypoints")]
    if len(named) == 1 and named[0] != list(skeleton.keypoints):
        raise CheckpointError(
            f"{checkpoint}: trained for the skeleton {skeleton.name!r}, {skeleton.num_keypoints} keypoints "
            f"({', '.join(skeleton.keypoints[:3])} ...), but 'categories' of {file} names {len(named[0])} "
            f"({', '.join(map(str, named[0][:3]))} ...). Evaluate it on annotations of its own skeleton, or "
            f"evaluate a checkpoint trained for this one."
        )


def _mmpose_boxes(split: CocoSplit, truth: dict[str, Any]) -> CocoSplit:
    """Ground-truth boxes by mmpose's rule: both corners clipped to the image, no pixel taken off the size
    (base_coco_style_dataset.py:283-290)."""
    raw = {a["id"]: a["bbox"] for a in truth["annotations"]}

    def box(photo: Photo, person: Person) -> NDArray[np.float32]:
        x, y, w, h = raw[person.ann_id]
        corners = np.clip([x, y, x + w, y + h], 0, np.array([photo.width, photo.height] * 2) - 1)
        return np.concatenate([corners[:2], corners[2:] - corners[:2]]).astype(np.float32)

    photos = tuple(
        replace(photo, people=tuple(replace(p, bbox_xywh=box(photo, p)) for p in photo.people))
        for photo in split.photos
    )
    return replace(split, photos=photos)


def unusable_photos(problems: list[tuple[str, str]]) -> DataError:
    listed = "; ".join(f"{file}: {why}" for file, why in problems[:10])
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return DataError(
        f"{len(problems)} photographs cannot be used, so its AP would not be comparable: "
        f"{listed}{more}. Copy the photographs again, or take them and their annotations out of the set."
    )


def sha256_of_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
