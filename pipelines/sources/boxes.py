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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs

from hrnet_core.errors import DataError
from hrnet_core.geometry import FARTHEST
from pipelines.sources.media import Media
from pipelines.storage import read_json, sha256_of

Rows = list[list[float]]
"""Boxes [x, y, w, h, score], px of the picture as it is predicted."""


@dataclass
class Entry:
    """What the file says of one picture."""

    rows: Rows = field(default_factory=list)
    """Of a video: of every frame, unless `frames` is there."""
    frames: dict[int, Rows] | None = None
    image_id: int | None = None
    size: tuple[int, int] | None = None
    """(width, height) that the file gives the picture."""
    invalid: list[str] = field(default_factory=list)
    """Its boxes that are none, each with what is wrong."""


@dataclass(frozen=True)
class BoxesFile:
    path: str
    sha256: str
    entries: dict[str, Entry]
    """By file name, or by number for COCO's results."""
    complete: bool
    """The file lists its pictures (annotations): one that is not listed is not its."""

    def match(self, media: Sequence[Media]) -> tuple[dict[str, Entry], list[str]]:
        """Entries by Media.name, and the keys that no picture has.

        A key fits the picture's name; or, where only one picture has it, the last part of the name or the
        number that it is. DataError where nothing fits.
        """
        last = Counter(posixpath.basename(m.name) for m in media)
        number = Counter(number_in(m.name) for m in media)
        found: dict[str, Entry] = {}
        used = set()
        for one in media:
            keys = [one.name]
            keys += [base] if last[base := posixpath.basename(one.name)] == 1 else []
            keys += [digits] if number[digits := number_in(one.name)] == 1 else []
            key = next((k for k in keys if k in self.entries), None)
            if key is not None:
                found[one.name] = self.entries[key]
                used.add(key)
        if not found:
            some = ", ".join(list(self.entries)[:3])
            raise DataError(
                f"{self.path}: its pictures ({some} ...) are none of the sources "
                f"({media[0].name} ...). Boxes are matched by file name, detections by the number "
                f"in the file name (docs/predict.md)."
            )
        return found, [key for key in self.entries if key not in used]


def read_boxes(file: str | Path, score_threshold: float = 0.0) -> BoxesFile:
    """A boxes file of any of the three kinds. DataError says which field does not fit."""
    _, content = read_json(file, "the boxes")
    if isinstance(content, list):
        entries = _detections(str(file), content, score_threshold)
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        entries = _annotations(str(file), content)
    elif isinstance(content, dict):
        entries = {
            str(name): _named(str(file), name, value, score_threshold) for name, value in content.items()
        }
    else:
        raise _other_kind(file, f"it is a {type(content).__name__}")
    if not entries:
        raise _other_kind(file, "it is empty")
    sha256 = sha256_of(fs.LocalFileSystem(), str(Path(file).absolute()))
    complete = isinstance(content, dict) and "images" in content
    return BoxesFile(str(file), sha256, entries, complete)


def _annotations(file: str, content: dict[str, Any]) -> dict[str, Entry]:
    """People of a COCO annotation file; crowds are none."""
    by_id: dict[Any, Entry] = {}
    entries: dict[str, Entry] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or type(image.get("id")) is not int or "file_name" not in image:
            raise _other_kind(file, f"an entry of images has no integer id and file_name: {image!r:.80}")
        size = (image.get("width"), image.get("height"))
        entry = Entry(image_id=image["id"], size=size if all(type(s) is int for s in size) else None)
        by_id[image["id"]] = entries[str(image["file_name"])] = entry
    people = _people_category(content.get("categories"))
    for annotation in content.get("annotations") or []:
        if not isinstance(annotation, dict) or annotation.get("image_id") not in by_id:
            raise _other_kind(file, f"an annotation is of no image of the file: {annotation!r:.80}")
        if annotation.get("iscrowd") or (people and annotation.get("category_id") not in people):
            continue
        _take(by_id[annotation["image_id"]], annotation.get("bbox"), 1.0, 0.0)
    return entries


def _people_category(categories: Any) -> set[Any]:
    """Ids of the category person, or of those with keypoints; empty where the file says nothing."""
    named = [c for c in categories or [] if isinstance(c, dict)]
    people = {c.get("id") for c in named if c.get("name") == "person"}
    return people or {c.get("id") for c in named if c.get("keypoints")}


def _detections(file: str, content: list[Any], score_threshold: float) -> dict[str, Entry]:
    """People of a COCO results file: category 1, or none given."""
    entries: dict[str, Entry] = {}
    for index, row in enumerate(content):
        key = row.get("image_id", row.get("file_name")) if isinstance(row, dict) else None
        if type(key) not in (int, str) or "bbox" not in row:
            raise _other_kind(file, f"entry {index} has no image_id and bbox: {row!r:.80}")
        entry = entries.setdefault(str(key), Entry(image_id=key if type(key) is int else None))
        if row.get("category_id", 1) == 1:
            _take(entry, row["bbox"], row.get("score", 1.0), score_threshold)
    return entries


def _named(file: str, name: str, value: Any, score_threshold: float) -> Entry:
    entry = Entry()
    if isinstance(value, dict):
        entry.frames = {}
        for frame, boxes in value.items():
            if not str(frame).isdigit() or not isinstance(boxes, list):
                raise _other_kind(
                    file, f"{name!r} has the key {frame!r}, which is no frame number with a list"
                )
            rows = Entry()
            for box in boxes:
                _take_row(rows, box, score_threshold)
            entry.frames[int(frame)] = rows.rows
            entry.invalid += [f"frame {frame}: {why}" for why in rows.invalid]
        return entry
    if not isinstance(value, list):
        raise _other_kind(file, f"the value of {name!r} is {value!r:.60}")
    for box in value:
        _take_row(entry, box, score_threshold)
    return entry


def _take_row(entry: Entry, box: Any, score_threshold: float) -> None:
    """[x, y, w, h] or [x, y, w, h, score]"""
    scored = isinstance(box, list) and len(box) == 5
    _take(entry, box[:4] if scored else box, box[4] if scored else 1.0, score_threshold)


def _take(entry: Entry, box: Any, score: Any, score_threshold: float) -> None:
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) > 0):
        entry.invalid.append(f"box {box!r:.80} is not [x, y, w, h] with w and h above 0")
    elif not _is_number(score):
        entry.invalid.append(f"the score {score!r:.40} of box {box} is no finite number")
    elif score >= score_threshold:
        entry.rows.append([float(v) for v in (*box, score)])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= FARTHEST  # NaN compares False


def number_in(name: str) -> str:
    """ "139" of "val/000000000139.jpg", "" of a name that is no number."""
    stem = posixpath.splitext(posixpath.basename(name))[0]
    return str(int(stem)) if stem.isascii() and stem.isdigit() else ""


def _other_kind(file: str | Path, what: str) -> DataError:
    return DataError(
        f"{file}: {what}. A boxes file is COCO annotations, a list of COCO detections, or an object "
        f'{{"picture.jpg": [[x, y, w, h], ...]}} (docs/predict.md).'
    )
