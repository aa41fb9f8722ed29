"""Annotation rows judged one by one: people, a rejection for each of the others, repairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hrnet_core.geometry import FARTHEST, sanitize_boxes
from pipelines.sources.records import BOX_AREA, LARGEST, People, Rejection


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
    crowdIndex: Any = None


def name_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    if len(theirs) != len(ours):
        sides = (set(ours) - set(theirs), set(theirs) - set(ours))
        missing, unknown = (listed(list(map(repr, sorted(side)))) or "none" for side in sides)
        return f"{len(theirs)} keypoints instead of {len(ours)} (missing {missing}; unknown {unknown})"
    pairs = enumerate(zip(theirs, ours, strict=True))
    differing = [f"position {i} has {a!r} instead of {b!r}" for i, (a, b) in pairs if a != b]
    places = listed(differing, shown=20)
    return f"{'the same names in another order' if set(theirs) == set(ours) else 'other names'}: {places}"


class _Problems:
    """Why each of the rows is left out: the first reason found, None while there is none."""

    def __init__(self, rows: Sequence[Annotation], images: Mapping[int, ImageEntry]) -> None:
        self._rows, self._images = rows, images
        self._found: list[tuple[str, str] | None] = [None] * len(rows)

    def mark(
        self, where: NDArray[np.bool_] | Sequence[bool], reason: str, detail: Callable[[int], str]
    ) -> None:
        for index in np.flatnonzero(where).tolist():
            self._found[index] = self._found[index] or (reason, detail(index))

    @property
    def marked(self) -> NDArray[np.bool_]:
        """(N,) where a reason was found."""
        return np.array([problem is not None for problem in self._found], bool)

    def rejections(self, where: NDArray[np.bool_]) -> list[Rejection]:
        """Of the marked rows (N,) that are asked for."""
        found = []
        for index in np.flatnonzero(where).tolist():
            row, (reason, detail) = self._rows[index], self._found[index] or ("", "")
            file = printable(self._images[row.image_id].file_name)
            found.append(Rejection(reason, file, row.image_id, row.id, detail))
        return found


@dataclass(frozen=True)
class Judged:
    """What became of N rows."""

    people: People
    """(N): everyone, numbers that are none as 0."""
    usable: NDArray[np.bool_]
    """(N,)"""
    rejected: list[Rejection]
    """Of each other row, why."""
    unscorable: list[Rejection]
    """Of those: people whose keypoints cannot be read."""
    has_areas: bool
    """Whether anyone's area is the annotations' own."""
    repaired: dict[str, int]


def judge(rows: Sequence[Annotation], images: Mapping[int, ImageEntry], num_keypoints: int) -> Judged:
    """Annotations in order of (image_id, id) -> the table of people, and which of them can be used.

    An area that is no number above 0 is BOX_AREA of the box.
    """
    problems = _Problems(rows, images)
    crowd = np.array([is_crowd(row.iscrowd) for row in rows], bool)
    problems.mark(crowd, "crowd", lambda i: "iscrowd")
    keypoints, repaired = _keypoints(rows, num_keypoints, problems)
    unscorable = problems.marked & ~crowd
    labels = (keypoints[..., 2] > 0).sum(axis=1)
    problems.mark(labels == 0, "no_keypoints", lambda i: "no keypoint is labelled")
    strange = ~np.isin(keypoints[..., 2], (0, 1, 2))
    someone = np.asarray(strange.any(1))
    problems.mark(someone, "visibility_invalid", lambda i: f"v is {keypoints[i, :, 2][strange[i]][0]:g}")

    boxes = _numbers(rows, "bbox", 4, problems, "bbox_invalid", "bbox_invalid")
    stated = boxes.tolist()
    empty = np.asarray((boxes[:, 2:] <= 0).any(1))
    problems.mark(empty, "bbox_invalid", lambda i: f"bbox {stated[i]} is empty")
    sizes = _sizes(rows, images)
    clean, inside = sanitize_boxes(boxes, *sizes.T)
    problems.mark(
        ~inside,
        "bbox_degenerate",
        lambda i: (
            f"bbox {stated[i]} has no pixel in the picture"
            + (": fractions from 0 to 1? Write px" if max(stated[i]) <= 1.5 else "")
        ),
    )
    stated_area = np.array([is_number(row.area) and row.area > 0 for row in rows], bool)
    area = BOX_AREA * (boxes[:, 2] * boxes[:, 3])
    area[stated_area] = [row.area for row, good in zip(rows, stated_area, strict=True) if good]
    miscounted = [r.num_keypoints not in (None, n) for r, n in zip(rows, labels.tolist(), strict=True)]
    repaired |= {
        "boxes_clipped": _reach_beyond(boxes, sizes),
        "num_keypoints": np.array(miscounted, bool),
        "area_from_box": ~stated_area,
    }
    people = People(
        image_id=np.array([row.image_id for row in rows], np.int64),
        ann_id=np.array([row.id for row in rows], np.int64),
        category_id=np.array([row.category_id for row in rows], np.int64),
        keypoints=keypoints,
        bbox_xywh=clean,
        stated_xywh=boxes,
        area=area,
        score=np.ones(len(rows)),
        crowd=crowd,
    )
    usable = ~problems.marked
    counts = {kind: int((usable & where).sum()) for kind, where in repaired.items()}
    return Judged(
        people,
        usable,
        problems.rejections(~usable),
        problems.rejections(unscorable),
        bool(stated_area.any()),
        {kind: number for kind, number in counts.items() if number},
    )


def is_crowd(iscrowd: Any) -> bool:
    """As pycocotools has it, whatever is true; but not the ways of writing no: null, NaN, "0", "false"."""
    return bool(iscrowd) and iscrowd == iscrowd and str(iscrowd).lower() not in ("0", "false", "no", "none")


def _keypoints(
    rows: Sequence[Annotation], num_keypoints: int, problems: _Problems
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.bool_]]]:
    """(N, K, 3), and the rows in which something was repaired: where v is 0 the place is zero, whatever stood
    there; a row without any keypoints has none labelled."""
    nested = np.zeros(len(rows), bool)
    for number, row in enumerate(rows):
        if isinstance(row.keypoints, list) and row.keypoints and all(map(_is_triple, row.keypoints)):
            row.keypoints = list(chain.from_iterable(row.keypoints))
            nested[number] = True
        if not row.keypoints:
            row.keypoints = [0] * (3 * num_keypoints)
    nulls = np.zeros(len(rows), bool)
    lists = [row.keypoints if isinstance(row.keypoints, list) else [] for row in rows]
    if _matrix(lists, 3 * num_keypoints) is None:
        for number, (row, values) in enumerate(zip(rows, lists, strict=True)):
            if len(values) == 3 * num_keypoints:
                row.keypoints = _without_nulls(values)
                nulls[number] = row.keypoints is not values
    triples = _numbers(
        rows, "keypoints", 3 * num_keypoints, problems, "keypoints_length", "keypoints_invalid"
    )
    keypoints = triples.reshape(-1, num_keypoints, 3)
    hidden = keypoints[..., 2] == 0
    somewhere = (hidden & (keypoints[..., :2] != 0).any(axis=2)).any(axis=1)
    keypoints[hidden] = 0
    repaired = {"nested_keypoints": nested, "null_coordinates": nulls, "hidden_coordinates": somewhere}
    return keypoints, repaired


def _is_triple(value: Any) -> bool:
    """[x, y, v], as tools write that nest what COCO has flat."""
    return isinstance(value, list) and len(value) == 3


def _without_nulls(values: list[Any]) -> list[Any]:
    """The same list, or a copy where a keypoint that is not labelled has null or NaN for a place."""
    if all(value is not None and value == value for value in values):  # NaN is not itself
        return values
    mended = list(values)
    for start in range(0, len(values), 3):
        x, _, v = values[start : start + 3]
        if v in (0, None) or (v != v and x != x):
            mended[start : start + 3] = 0, 0, 0
    return mended


def _reach_beyond(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) boxes that leave their picture by more than a pixel."""
    left, right = boxes[:, :2] < -1, boxes[:, :2] + boxes[:, 2:] > sizes + 1
    return np.asarray(left.any(1) | right.any(1))


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
    if (matrix := _matrix(values, length)) is not None:
        return matrix
    strange = [next((repr(v) for v in row if not is_number(v)), "") for row in values]
    problems.mark([bool(s) for s in strange], no_number, lambda i: f"{key} has {strange[i]}")
    cleared = [[0] * length if s else row for row, s in zip(values, strange, strict=True)]
    return np.array(cleared, np.float64).reshape(len(rows), length)


def _matrix(values: Sequence[Sequence[Any]], length: int) -> NDArray[np.float64] | None:
    """float64 (rows, length), or None where not everything is a number. One pass in C over all of them: only
    a file with something wrong is gone through row by row."""
    kinds = set(map(type, chain.from_iterable(values)))
    if kinds <= {int, float} and {len(row) for row in values} <= {length}:
        with contextlib.suppress(OverflowError):
            matrix = np.array(values, np.float64).reshape(len(values), length)
            if (np.abs(matrix) <= LARGEST).all():
                return matrix
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "absent or null"
    return f"{len(value)} entries" if isinstance(value, list) else type(value).__name__


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # NaN compares False


def is_box(value: Any) -> bool:
    """Whether PosePredictor takes it, in float32: [x, y, w, h] px with w and h above 0."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_number, value)):
        return False
    box = np.array(value, np.float32)
    return bool((np.abs(box) <= FARTHEST).all() and (box[2:] > 0).all())


def not_a_box(value: Any) -> str:
    """What to say of what is none."""
    five = isinstance(value, list) and len(value) == 5
    more = ": a fifth number can only be the score, and the entry has another" if five else ""
    return f"is not [x, y, w, h] with w and h above 0{more}"


def whole(value: Any) -> Any:
    """1 for 1.0, as tools write that keep all numbers in one table; anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def _sizes(rows: Sequence[Annotation], images: Mapping[int, ImageEntry]) -> NDArray[np.float64]:
    """(N, 2) width and height of each row's picture; endless where the picture itself is out."""
    usable = {i: (image.width, image.height) for i, image in images.items() if not image_problem(image)}
    endless = (LARGEST, LARGEST)
    return np.array([usable.get(row.image_id, endless) for row in rows], np.float64).reshape(-1, 2)


def image_problem(image: ImageEntry, sized: bool = True) -> tuple[str, str] | None:
    """(reason, detail) where the entry of `images` alone rules the picture out. sized: it must say how large
    the picture is."""
    name, width, height = image.file_name, image.width, image.height
    if not isinstance(name, str) or not name:
        return "missing_image", f"file_name is {name!r}"
    if printable(name) != name:
        return "missing_image", "file_name has half a character (a lone surrogate)"
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or "\0" in name or name[1:2] == ":":
        return "path_outside_root", "file_name must be a relative path inside the split's folder"
    if sized and not all(type(side) is int and 0 < side <= LARGEST for side in (width, height)):
        return "image_size_invalid", f"width and height are {width!r} and {height!r}"
    return None


def printable(name: Any) -> str:
    """A file name that can be printed and stored, whatever JSON made of it."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def listed(items: Sequence[Any], shown: int = 10) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more
