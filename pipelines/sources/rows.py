"""Annotation rows judged one by one: people, a rejection for each of the others, repairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hrnet_core.geometry import sanitize_boxes
from pipelines.sources.records import BOX_AREA, LARGEST, Person, Rejection


class Annotation(msgspec.Struct, gc=False):
    """One entry of `annotations`, its fields as the file has them. The others are passed over unbuilt: most
    of a COCO file is outlines (`segmentation`), which nobody here looks at."""

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    keypoints: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = None
    num_keypoints: Any = None


class ImageEntry(msgspec.Struct, gc=False):
    """One entry of `images`, likewise."""

    id: Any = None
    file_name: Any = None
    width: Any = None
    height: Any = None


def name_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    if len(theirs) != len(ours):
        missing, unknown = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        return f"{len(theirs)} keypoints instead of {len(ours)} (missing {missing}, unknown {unknown})"
    pairs = enumerate(zip(theirs, ours, strict=True))
    differing = [f"position {i} has {a!r} instead of {b!r}" for i, (a, b) in pairs if a != b]
    places = listed(differing, shown=len(ours))
    return f"{'the same names in another order' if set(theirs) == set(ours) else 'other names'}: {places}"


class _Problems:
    """Why each of the rows is left out: the first reason found, None while there is none."""

    def __init__(self, rows: int) -> None:
        self.found: list[tuple[str, str] | None] = [None] * rows

    def mark(
        self, where: NDArray[np.bool_] | Sequence[bool], reason: str, detail: Callable[[int], str]
    ) -> None:
        for index in np.flatnonzero(where).tolist():
            self.found[index] = self.found[index] or (reason, detail(index))


def people_of(
    rows: Sequence[Annotation], images: Mapping[int, ImageEntry], num_keypoints: int
) -> tuple[dict[int, list[Person]], list[Rejection], dict[str, int]]:
    """Annotations -> people by image_id, a rejection for each of the others, the count of repairs.

    Where none of them has an area, the field is not part of this data: it is BOX_AREA of the box.
    """
    problems = _Problems(len(rows))
    problems.mark([bool(row.iscrowd) for row in rows], "crowd", lambda i: "iscrowd")
    triples = _numbers(
        rows, "keypoints", 3 * num_keypoints, problems, "keypoints_length", "keypoints_invalid"
    )
    triples = triples.reshape(-1, num_keypoints, 3)
    places, visible = triples[..., :2], triples[..., 2]
    labels = (visible > 0).sum(axis=1)
    strange = ~np.isin(visible, (0, 1, 2))
    problems.mark(strange.any(1), "visibility_invalid", lambda i: f"v is {visible[i][strange[i]][0]:g}")
    problems.mark(labels == 0, "no_keypoints", lambda i: "no keypoint is labelled")

    boxes = _numbers(rows, "bbox", 4, problems, "bbox_invalid", "bbox_invalid")
    told = boxes.tolist()
    problems.mark((boxes[:, 2:] <= 0).any(1), "bbox_invalid", lambda i: f"bbox {told[i]} is empty")
    sizes = _sizes(rows, images)
    clean, inside = sanitize_boxes(boxes, *sizes)
    problems.mark(~inside, "bbox_degenerate", lambda i: f"bbox {told[i]} has no pixel in the picture")
    areas = [row.area for row in rows]
    from_box = all(area is None for area in areas)
    if from_box:
        areas = (BOX_AREA * boxes[:, 2] * boxes[:, 3]).tolist()
    no_area = [not (is_number(area) and area > 0) for area in areas]
    problems.mark(no_area, "area_not_positive", lambda i: f"area is {areas[i]!r}")

    hidden = visible == 0
    keep = np.array([problem is None for problem in problems.found], bool)
    declared = [row.num_keypoints in (None, n) for row, n in zip(rows, labels.tolist(), strict=True)]
    beyond = (boxes[:, :2] < -1).any(1) | (boxes[:, :2] + boxes[:, 2:] > np.stack(sizes, 1) + 1).any(1)
    repaired = {
        "boxes_clipped": int((keep & beyond).sum()),
        "hidden_coordinates": int((keep & (hidden & (places != 0).any(axis=2)).any(axis=1)).sum()),
        "num_keypoints": int((keep & np.logical_not(declared)).sum()),
        "area_from_box": int(keep.sum()) if from_box else 0,
    }
    places = np.where(hidden[..., None], 0, places).astype(np.float32)
    visible = visible.astype(np.float32)
    people: dict[int, list[Person]] = {}
    rejected = []
    for i, (row, problem) in enumerate(zip(rows, problems.found, strict=True)):
        image_id = row.image_id
        if problem is None:
            person = Person(image_id, row.id, clean[i], places[i], visible[i], float(areas[i]))
            people.setdefault(image_id, []).append(person)
        else:
            file = printable(images[image_id].file_name)
            rejected.append(Rejection(problem[0], file, image_id, row.id, problem[1]))
    return people, rejected, {kind: number for kind, number in repaired.items() if number}


def _numbers(
    rows: Sequence[Annotation], key: str, length: int, problems: _Problems, wrong_length: str, no_number: str
) -> NDArray[np.float64]:
    """float64 (rows, length) of a list field; a row without such a list is marked, and zero."""
    values = [getattr(row, key) for row in rows]
    right = [isinstance(v, list) and len(v) == length for v in values]
    problems.mark(
        np.logical_not(right), wrong_length, lambda i: f"{key} is {_kind(values[i])}, not {length} numbers"
    )
    values = [v if good else [0] * length for v, good in zip(values, right, strict=True)]
    # One pass in C over all numbers; only a file with something wrong is gone through row by row.
    if set(map(type, chain.from_iterable(values))) <= {int, float}:
        with contextlib.suppress(OverflowError):
            matrix = np.array(values, np.float64).reshape(len(rows), length)
            if (np.abs(matrix) <= LARGEST).all():
                return matrix
    strange = [next((repr(v) for v in row if not is_number(v)), "") for row in values]
    problems.mark([bool(s) for s in strange], no_number, lambda i: f"{key} has {strange[i]}")
    cleared = [[0] * length if s else row for row, s in zip(values, strange, strict=True)]
    return np.array(cleared, np.float64).reshape(len(rows), length)


def _kind(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else type(value).__name__


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # NaN compares False


def _sizes(
    rows: Sequence[Annotation], images: Mapping[int, ImageEntry]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Width and height of each row's picture; endless where the picture itself is out."""
    usable = {i: (image.width, image.height) for i, image in images.items() if not image_problem(image)}
    endless = (LARGEST, LARGEST)
    sizes = np.array([usable.get(row.image_id, endless) for row in rows], np.float64).reshape(-1, 2)
    return sizes[:, 0], sizes[:, 1]


def image_problem(image: ImageEntry) -> tuple[str, str] | None:
    """(reason, detail) where the entry of `images` alone rules the picture out."""
    name, width, height = image.file_name, image.width, image.height
    if not isinstance(name, str) or not name:
        return "missing_image", f"file_name is {name!r}"
    if printable(name) != name:
        return "missing_image", "file_name has half a character (a lone surrogate)"
    if name[0] == "/" or ".." in name.split("/") or "\\" in name or "\0" in name or name[1:2] == ":":
        return "path_outside_root", "file_name must be a relative path inside the split's folder"
    if not all(type(side) is int and 0 < side <= LARGEST for side in (width, height)):
        return "image_size_invalid", f"width and height are {width!r} and {height!r}"
    return None


def printable(name: Any) -> str:
    """A file name that can be printed and stored, whatever JSON made of it."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def listed(items: Sequence[Any], shown: int = 10) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more
