"""A user's boxes file -> boxes by picture. Three kinds of JSON are read:

    annotations   COCO: {"images", "annotations", ...}; pictures by file_name, ids from the file
    detections    COCO results: [{"image_id", "bbox", "score", "category_id"}]; image_id is the number in the
                  picture's name (COCO's 000000000139.jpg is 139), or a file name
    names         {"a.jpg": [[x, y, w, h], [x, y, w, h, score], ...], "clip.mp4": {"0": [[...]], "5": ...}}

A box that is none is left out with a reason; a file of another form is a DataError.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.files import json_kind
from pipelines.settings.config import BoxesCategory
from pipelines.sources.annotations import ALL, AnnotationFile, people_of_images
from pipelines.sources.json_file import load
from pipelines.sources.media import Media
from pipelines.sources.rows import is_box, is_number, listed, not_a_box, whole


@dataclass(frozen=True, eq=False)
class Entry:
    """What the file says of one picture or video."""

    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 5), np.float32))
    """(P, 5) x, y, w, h, score, px of the picture as it is predicted. Of a video: of every frame, unless
    `frames` is there."""
    frames: Mapping[int, NDArray[np.float32]] | None = None
    image_id: int | None = None
    size: tuple[int, int] | None = None
    """(width, height) that the file gives the picture."""
    invalid: tuple[str, ...] = ()
    """Its boxes that are none, each with what is wrong."""


@dataclass(frozen=True)
class BoxesFile:
    """A boxes file, read."""

    path: str
    sha256: str
    complete: bool
    """The file lists its pictures (annotations): one that is not listed is not its."""
    entries: dict[str, Entry]
    """By file name, or by number for COCO's results."""

    def match(self, media: Sequence[Media]) -> tuple[dict[str, Entry], list[str]]:
        """Entries by Media.name, and the keys that no picture has.

        A key fits the picture's name; or, where only one picture has it, the last part of the name or the
        number that it is. DataError where nothing fits, or where two sources have a name and it is not said
        whose the boxes are.
        """
        last = Counter(posixpath.basename(m.name) for m in media)
        number = Counter(number_in(m.name) for m in media)
        found: dict[str, Entry] = {}
        used = set()
        for one in media:
            first = one.first_name
            if first != one.name and one.name not in self.entries:
                for key in {first, number_in(first)} & self.entries.keys():
                    raise DataError(
                        f"{self.path}: whose are the boxes of {key}? Two sources have the name {first}; the "
                        f"second, {one.uri}, is {one.name} here. Predict one source at a time, or give boxes "
                        f"to both names."
                    )
            base, digits = posixpath.basename(one.name), number_in(one.name)
            keys = ((one.name, 1), (base, last[base]), (digits, number[digits]))
            its = next((key for key, uses in keys if uses == 1 and key in self.entries), None)
            if its is not None:
                found[one.name] = self.entries[its]
                used.add(its)
        if not found:
            some = ", ".join(list(self.entries)[:3])
            raise DataError(
                f"{self.path}: its pictures ({some} ...) are none of the sources "
                f"({media[0].name} ...). Boxes are matched by file name, detections by the number "
                f"in the file name (docs/predict.md)."
            )
        return found, [key for key in self.entries if key not in used]


def read_boxes(file: str | Path, score_threshold: float = 0.0, category: BoxesCategory = 1) -> BoxesFile:
    """A boxes file of any of the three kinds. category: that people have in COCO's results. DataError says
    which field does not fit."""
    name = str(file)
    content, sha256 = load(name, AnnotationFile)
    fields = content if isinstance(content, dict) else {}
    complete = isinstance(content, AnnotationFile) or isinstance(fields.get("images"), list)
    if complete:
        entries = _annotations(name, content)
    elif isinstance(content, list):
        entries = _detections(name, content, score_threshold, category)
    elif isinstance(content, dict):
        entries = {key: _named(name, key, value, score_threshold) for key, value in content.items()}
    else:
        raise _other_kind(name, f"it is {json_kind(content)}")
    if not entries:
        raise _other_kind(name, "it is empty")
    return BoxesFile(name, sha256, complete, entries)


def _annotations(file: str, content: Any) -> dict[str, Entry]:
    """People of a COCO annotation file; crowds are none."""
    entries: dict[str, Entry] = {}
    for image, people in people_of_images(file, content):
        name, size = image.file_name, (image.width, image.height)
        if not isinstance(name, str):
            raise _other_kind(file, f"image {image.id} has no file_name")
        if name in entries:
            raise DataError(
                f"{file}: images {entries[name].image_id} and {image.id} have one file_name, {name!r}, by "
                f"which boxes find their picture: give each its own, with its folder if need be."
            )
        known = size if all(type(side) is int for side in size) else None
        pairs = ((person.bbox, 1.0) for person in people)
        entries[name] = _entry(pairs, 0.0, image_id=image.id, size=known)
    return entries


def _detections(
    file: str, rows: Sequence[Any], score_threshold: float, category: BoxesCategory
) -> dict[str, Entry]:
    """People of a COCO results file: of the category, or where none is given."""
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    ids: dict[str, int] = {}
    for index, row in enumerate(rows):
        key = whole(row.get("image_id", row.get("file_name"))) if isinstance(row, dict) else None
        if type(key) not in (int, str) or "bbox" not in row:
            raise _other_kind(file, f"entry {index} has no image_id and bbox: {row!r:.80}")
        if type(whole(row.get("category_id"))) not in (int, type(None)):
            raise _other_kind(file, f"category_id of entry {index} is {row['category_id']!r:.40}, no integer")
        here = pairs.setdefault(str(key), [])
        if type(key) is int:
            ids[str(key)] = key
        if is_of(row.get("category_id"), category):
            here.append(box_and_score(row))
    refuse_other_category(file, rows, category, "--predict.boxes-category")
    return {key: _entry(here, score_threshold, image_id=ids.get(key)) for key, here in pairs.items()}


def _named(file: str, name: str, value: Any, score_threshold: float) -> Entry:
    """[box, ...] of a picture, or {"frame": [box, ...]} of a video."""
    if isinstance(value, list):
        return _entry(map(_with_score, value), score_threshold)
    if not isinstance(value, dict):
        raise _other_kind(file, f"the value of {name!r} is {value!r:.60}")
    frames = {}
    for frame, boxes in value.items():
        if not frame.isdecimal() or not isinstance(boxes, list):
            raise _other_kind(file, f"{name!r} has the key {frame!r}, which is no frame number with a list")
        frames[int(frame)] = _entry(map(_with_score, boxes), score_threshold)
    invalid = tuple(f"frame {number}: {why}" for number, entry in frames.items() for why in entry.invalid)
    return Entry(frames={number: entry.boxes for number, entry in frames.items()}, invalid=invalid)


def box_and_score(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """The bbox of a detection and its score, which may stand as a fifth number in the bbox. Where both are
    there and differ the fifth is something else: the bbox stays as it is, and is none."""
    box, score = row["bbox"], row.get("score")
    if isinstance(box, list) and len(box) == 5 and score in (None, box[4]):
        return box[:4], box[4]
    return box, 1.0 if score is None else score


def is_of(value: Any, wanted: BoxesCategory | frozenset[int]) -> bool:
    """Whether a category_id of a file is one that people have; one that is not stated may be any."""
    categories = frozenset({wanted}) if isinstance(wanted, int) else wanted
    return value is None or categories == ALL or whole(value) in categories


def named(wanted: BoxesCategory | frozenset[int]) -> str:
    """ "1", "3, 8, 21", "all" """
    return listed(sorted(wanted)) if isinstance(wanted, frozenset) else str(wanted)


def refuse_other_category(
    file: str, rows: Sequence[Any], wanted: BoxesCategory | frozenset[int], flag: str
) -> None:
    """DataError where no detection is of a category that people should have."""
    if rows and not any(is_of(row.get("category_id"), wanted) for row in rows):
        counts = Counter(str(whole(row["category_id"])) for row in rows)
        there = listed([f"{name} ({number:,} entries)" for name, number in counts.most_common()])
        raise DataError(
            f"{file}: no entry has category_id {named(wanted)}, which people should have; there is {there}. "
            f"Where people have another, as with detectors that count from 0, name it with {flag} NUMBER, or "
            f"take every entry with {flag} {ALL}."
        )


def _with_score(box: Any) -> tuple[Any, Any]:
    """[x, y, w, h] or [x, y, w, h, score] -> box, score"""
    return box_and_score({"bbox": box})


def _entry(pairs: Iterable[tuple[Any, Any]], score_threshold: float, **known: Any) -> Entry:
    """Of a picture's (box, score): boxes that score enough, and those that are none. known: of itself."""
    boxes, invalid = [], []
    for box, score in pairs:
        if not is_box(box):
            invalid.append(f"box {box!r:.80} {not_a_box(box)}")
        elif not is_number(score):
            invalid.append(f"the score {score!r:.40} of box {box} is no finite number")
        elif score >= score_threshold:
            boxes.append([*box, score])
    return Entry(np.array(boxes, np.float32).reshape(-1, 5), invalid=tuple(invalid), **known)


def number_in(name: str) -> str:
    """ "139" of "val/000000000139.jpg", "" of a name that is no number."""
    stem = posixpath.splitext(posixpath.basename(name))[0]
    return str(int(stem)) if stem.isascii() and stem.isdigit() else ""


def _other_kind(file: str | Path, what: str) -> DataError:
    return DataError(
        f"{file}: {what}. A boxes file is COCO annotations, a list of COCO detections, or an object "
        f'{{"picture.jpg": [[x, y, w, h], ...]}} (docs/predict.md).'
    )
