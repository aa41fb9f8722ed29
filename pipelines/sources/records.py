"""What a source holds: people, photographs, and why others are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError

PROTOCOL = frozenset({"crowd", "no_keypoints", "no_label", "empty_label"})
"""Reasons that are no defect: people whom the published protocol leaves out, YOLO pictures without any."""
BOX_AREA = 0.53
"""Area of a person by that of the box, where the annotations have none: as CrowdPose and AI Challenger are
scored, and as YOLO-pose models are."""
LARGEST = 1e9
"""A coordinate or area beyond this (or NaN) is not one."""


@dataclass(frozen=True, slots=True, eq=False)
class Person:
    """One annotated or detected person, all in photo px."""

    image_id: int
    ann_id: int
    """Annotation id; for a detection its index in the file."""
    bbox_xywh: NDArray[np.float32]
    """(4,): sanitised for annotations, as given for detections."""
    keypoints: NDArray[np.float32]
    """(K, 2); zeros where visible is 0."""
    visible: NDArray[np.float32]
    """(K,): 0 not labelled, 1 hidden, 2 seen."""
    area: float
    score: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """One picture of the annotations with its people, in order of ann_id; may have none."""

    image_id: int
    file_name: str
    """As in the annotations, relative to the split's folder."""
    path: str
    width: int
    height: int
    people: tuple[Person, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejection:
    """One picture (ann_id None) or person that was left out."""

    reason: str
    """missing_image, path_outside_root, image_size_invalid, bbox_invalid, bbox_degenerate,
    area_not_positive, keypoints_length, keypoints_invalid, visibility_invalid; crowd, no_keypoints
    (PROTOCOL); of YOLO-pose labels: no_label, empty_label (PROTOCOL), class_invalid, label_unreadable,
    label_shared, exif_rotated; for pictures that were opened (photos.py): ImageError's reasons, unreadable,
    size_differs."""
    file: str
    image_id: int
    ann_id: int | None
    detail: str
    people: int = 1
    """People lost with it."""

    @property
    def is_defect(self) -> bool:
        return self.reason not in PROTOCOL


@dataclass(frozen=True, slots=True, eq=False)
class CocoSplit:
    """One split: photos in order of image_id."""

    name: str
    annotation_file: str
    annotation_sha256: str
    photos: tuple[Photo, ...]
    rejected: tuple[Rejection, ...]
    """In order of (image_id, ann_id)."""
    repaired: Mapping[str, int] = field(default_factory=dict)
    """Count of each kind: boxes_clipped (more than a pixel beyond the picture), hidden_coordinates (v = 0
    with a place: place dropped), num_keypoints (the field disagrees with the keypoints: not used),
    other_category (no people: passed over), area_from_box (no annotation has an area: BOX_AREA of the box),
    duplicates (YOLO-pose: the same line again)."""
    category_id: int = 1

    @property
    def people(self) -> int:
        return sum(len(photo.people) for photo in self.photos)


def refuse_rejected(rejected: Sequence[Rejection]) -> None:
    """DataError with the first 20 names where anything but crowds and unlabelled people is left out."""
    names = [
        f"{r.file} ({r.reason}{'' if r.ann_id is None else f', annotation {r.ann_id}'})"
        for r in rejected
        if r.is_defect
    ]
    if names:
        raise DataError(
            f"data.strict: {len(names)} pictures or people cannot be used: {', '.join(names[:20])}"
            f"{' ...' if len(names) > 20 else ''}. Mend them, or run without --data.strict: they are then "
            f"left out and listed in rejected.parquet."
        )
