"""What a source holds: people as one table, photographs, and why others are left out.

A reader (coco.py, yolo.py, detections.py) makes the table once; whoever comes after takes rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError

LEFT_OUT_AS_PUBLISHED = frozenset({"crowd", "no_keypoints", "no_label", "empty_label"})
"""Reasons that are no defect: people whom the published protocol leaves out, YOLO pictures without any."""
BOX_AREA = 0.53
"""Area of a person by that of the box, where the annotations have none: as CrowdPose and AI Challenger are
scored, and as YOLO-pose models are."""
LARGEST = 1e9
"""A coordinate or area beyond this (or NaN) is not one."""


@dataclass(frozen=True, slots=True, eq=False)
class People:
    """N annotated or detected people, a row each, in order of (image_id, ann_id); all in photo px."""

    image_id: NDArray[np.int64]
    """(N,)"""
    ann_id: NDArray[np.int64]
    """(N,) annotation id; for a detection its index in the file."""
    category_id: NDArray[np.int64]
    """(N,) as the annotations have it: of one category nearly always, of several where they were joined."""
    keypoints: NDArray[np.float64]
    """(N, K, 3) x, y, v; v is 0 not labelled, 1 hidden, 2 seen; x and y are 0 where v is."""
    bbox_xywh: NDArray[np.float32]
    """(N, 4) to crop by: sanitised for annotations, as given for detections."""
    stated_xywh: NDArray[np.float64]
    """(N, 4) as the file states it."""
    area: NDArray[np.float64]
    """(N,) of the segment, in px²; NaN where it cannot be read."""
    score: NDArray[np.float64]
    """(N,) of the box; 1 for annotations."""
    crowd: NDArray[np.bool_]
    """(N,) a group, not a person: never predicted, forgiven in scoring."""

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, rows: slice | NDArray[Any]) -> People:
        """Some rows: a slice, indices or a mask (N,)."""
        return People(*(getattr(self, column.name)[rows] for column in fields(self)))

    @classmethod
    def empty(cls, num_keypoints: int) -> People:
        return cls(
            image_id=np.zeros(0, np.int64),
            ann_id=np.zeros(0, np.int64),
            category_id=np.zeros(0, np.int64),
            keypoints=np.zeros((0, num_keypoints, 3)),
            bbox_xywh=np.zeros((0, 4), np.float32),
            stated_xywh=np.zeros((0, 4)),
            area=np.zeros(0),
            score=np.zeros(0),
            crowd=np.zeros(0, bool),
        )

    def by_image(self) -> dict[int, slice]:
        """The rows of each image that has some."""
        return {int(self.image_id[rows.start]): rows for rows in equal_neighbours(self.image_id)}


def equal_neighbours(values: NDArray[Any]) -> list[slice]:
    """Slices of equal neighbours of (N,)."""
    if not len(values):
        return []
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    return [slice(int(a), int(b)) for a, b in pairwise([0, *edges, len(values)])]


@dataclass(frozen=True, slots=True)
class Photo:
    """One picture of the annotations."""

    image_id: int
    file_name: str
    """As in the annotations, relative to the split's folder."""
    path: str
    width: int
    height: int


def on_photos(people: People, photos: Sequence[Photo]) -> People:
    """Those whose picture is one of `photos`."""
    return people[np.isin(people.image_id, [photo.image_id for photo in photos])]


@dataclass(frozen=True, slots=True)
class Rejection:
    """One picture (ann_id None) or person that was left out."""

    reason: str
    """missing_image, path_outside_root, image_size_invalid, bbox_invalid, bbox_degenerate,
    same_file, keypoints_length, keypoints_invalid, visibility_invalid; crowd, no_keypoints
    (LEFT_OUT_AS_PUBLISHED); of YOLO-pose labels: no_label, empty_label (as published too), class_invalid,
    label_unreadable, label_shared, exif_rotated; for pictures that were opened (photos.py): ImageError's
    reasons, unreadable, size_differs."""
    file: str
    image_id: int
    ann_id: int | None
    detail: str
    people: int = 1
    """People lost with it."""

    @property
    def is_defect(self) -> bool:
        return self.reason not in LEFT_OUT_AS_PUBLISHED

    @property
    def order(self) -> tuple[int, int]:
        """By image; the picture itself before its people."""
        return self.image_id, -1 if self.ann_id is None else self.ann_id


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """What poses are scored against: everyone of one category, or of some that were joined and are scored as
    one, with crowds and people without keypoints."""

    name: str
    """The file."""
    image_ids: NDArray[np.int64]
    """(M,) of all pictures, in order."""
    people: People
    category_ids: frozenset[int] = frozenset({1})
    crowd_index: NDArray[np.float64] | None = None
    """(M,) how crowded each picture is, where the file says so (CrowdPose)."""
    has_areas: bool = True
    """Whether the file states areas; where not, `people` has BOX_AREA of the box."""
    unscorable: tuple[Rejection, ...] = ()
    """People whose keypoints cannot be read: nobody could say how well a pose fits."""

    def refuse_unscorable(self) -> None:
        """DataError where somebody cannot be scored: left out, they would raise the AP in silence."""
        if self.unscorable:
            first = self.unscorable[0]
            raise DataError(
                f"{self.name}: {len(self.unscorable)} people cannot be scored against, the first is "
                f"annotation {first.ann_id} of image {first.image_id}: {first.detail}. Mend them, or take "
                f"them out."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One split of a source: photos in order of image_id, and those of its people that can be used."""

    name: str
    annotation_file: str
    annotation_sha256: str
    photos: tuple[Photo, ...]
    people: People
    """All are on one of `photos`."""
    truth: GroundTruth
    rejected: tuple[Rejection, ...]
    """In order of (image_id, ann_id)."""
    repaired: Mapping[str, int] = field(default_factory=dict)
    """Count of each kind: boxes_clipped (more than a pixel beyond the picture), hidden_coordinates (v = 0
    with a place: place dropped), null_coordinates (null or NaN there), nested_keypoints ([x, y, v] each),
    whole_numbers (7.0 for 7), file_names (found under another spelling), byte_order_mark, sizes_read (from
    the picture, where the entry has none), box_labels (a box alone over somebody with keypoints: passed
    over), num_keypoints (the field disagrees with the keypoints: not used), other_category (no people:
    passed over), area_from_box (no area above 0: BOX_AREA of the box), two_dimensions, identity_flip_idx,
    fractions_clipped (YOLO-pose: data_yaml.py, yolo.py), duplicates (YOLO-pose: the same line again)."""

    def sizes_of(self, people: People) -> NDArray[np.float64]:
        """(N, 2) width and height of the photo of each of N people on `photos`."""
        sizes = {photo.image_id: (photo.width, photo.height) for photo in self.photos}
        of_people = [sizes[image_id] for image_id in people.image_id.tolist()]
        return np.array(of_people, np.float64).reshape(-1, 2)

    def by_photo(self) -> Iterator[tuple[Photo, slice]]:
        """Photos with people, and their rows in `people`."""
        rows = self.people.by_image()
        return ((photo, rows[photo.image_id]) for photo in self.photos if photo.image_id in rows)


def counted(kinds: Mapping[str, int]) -> str:
    """ "area_from_box 3, whole_numbers 1,024" """
    return ", ".join(f"{kind} {number:,}" for kind, number in sorted(kinds.items()))


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
