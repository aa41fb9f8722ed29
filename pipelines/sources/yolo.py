"""YOLO-pose labels in: the same person records as from COCO, with a reason for each one left out.

    ROOT/images/SPLIT/**/*.jpg   ROOT/labels/SPLIT/**/*.txt, a line a person, all as fractions of the picture:
                                 class  cx cy w h  K x (x y v), or K x (x y)
    ROOT/data.yaml               optional, as ultralytics has it (data_yaml.py)

The labels say less than COCO's: no size of the picture (read from its header), no crowds, no area. The
area is BOX_AREA of the box, counted as a repair: good enough to train with, not for an AP.

They belong to the displayed picture (ultralytics applies EXIF), while crops are cut from stored pixels: a
picture that EXIF turns is rejected. The fields themselves are judged by `judge`, as COCO's are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from hrnet_core.errors import DataError, ImageError
from hrnet_core.skeleton import Skeleton
from pipelines.sources.data_yaml import DESCRIPTION, FLAT, read_description
from pipelines.sources.media import PICTURES
from pipelines.sources.photos import open_header
from pipelines.sources.records import GroundTruth, Photo, Rejection, Split, on_photos
from pipelines.sources.rows import Annotation, ImageEntry, judge, listed, printable
from pipelines.storage.files import absolute, join, list_files, list_tree, read_file

HAIR = 1e-3
"""How far a fraction may lie outside 0 to 1: tools round."""


def read_yolo(root: str | Path, split: str, skeleton: Skeleton, category: str | None = None) -> Split:
    """Pictures and labels of a split ("all": of images/ itself); ROOT may be a URI.

    Pictures are numbered from 1 in the order of their names, people in the order of pictures and lines.
    Reasons beyond read_coco's: no_label and empty_label (a picture without people; no defect),
    class_invalid, label_unreadable, label_shared (two pictures of one name) and exif_rotated.
    DataError where data.yaml contradicts the skeleton, or the folders are not those of such a set.
    """
    root = absolute(str(root))
    description = read_description(root, split, skeleton, category)
    pictures, labels, classes = description.pictures, description.labels, description.classes
    found, rejected = _read_pictures(pictures, labels, list_files if split == FLAT else list_tree)
    digest = hashlib.sha256(description.raw)
    images: dict[int, ImageEntry] = {}
    rows: list[Annotation] = []
    origin: dict[int, str] = {}
    passed: Counter[str] = Counter(description.repaired)
    others: Counter[int] = Counter()
    for one in found:
        content, label = one.content or b"", _label_name(one.name)
        digest.update(f"{printable(one.name)}\0{len(content)}\0".encode() + content)
        lines = _lines(content.decode("utf-8-sig", errors="replace"), classes, passed, others)
        if one.problem:
            name, detail = printable(one.name), printable(one.problem)
            rejected.append(Rejection(one.problem.reason, name, one.image_id, None, detail, len(lines)))
            continue
        images[one.image_id] = ImageEntry(one.image_id, one.name, *one.size)
        if not content.strip():
            reason, detail = ("no_label", "no file") if one.content is None else ("empty_label", "no line")
            rejected.append(Rejection(reason, one.name, one.image_id, None, f"{label}: {detail}", 0))
        for number, fields in lines:
            identity = len(origin) + 1
            origin[identity] = f"{label} line {number}"
            if _number(fields[0]) in classes:
                bbox, keypoints = _row(fields, one, skeleton, description.dimensions, passed)
                rows.append(Annotation(identity, one.image_id, 1, bbox=bbox, keypoints=keypoints))
            else:
                detail = f"{origin[identity]}: class {fields[0]!r:.40} is no number"
                rejected.append(Rejection("class_invalid", one.name, one.image_id, identity, detail))
    if others and not rows:
        raise DataError(
            f"{labels}: no line is of class {listed(sorted(classes))}, which is read; the labels have "
            f"{listed([f'{n:,} lines of class {c}' for c, n in sorted(others.items())])}. Classes count from "
            f"0: name that class in {DESCRIPTION} (names: {{{min(others)}: person}}), or write 0."
        )
    judged = judge(rows, images, skeleton.num_keypoints)
    rejected += [replace(r, detail=f"{origin[r.ann_id or 0]}: {r.detail}") for r in judged.rejected]
    photos = tuple(
        Photo(i, p.file_name, join(pictures, p.file_name), p.width, p.height) for i, p in images.items()
    )
    return Split(
        name=split,
        annotation_file=labels,
        annotation_sha256=digest.hexdigest(),
        photos=photos,
        people=on_photos(judged.people[judged.usable], photos),
        truth=GroundTruth(labels, np.array(list(images), np.int64), judged.people, has_areas=False),
        rejected=tuple(sorted(rejected, key=attrgetter("order"))),
        repaired={**judged.repaired, **passed},
    )


# ---------------------------------------------------------------------------------- pictures and labels


@dataclass(frozen=True)
class _Picture:
    """One picture and its label file, as they were found."""

    image_id: int
    name: str
    content: bytes | None
    """What is in the label file; None where there is none."""
    size: tuple[int, int] = (0, 0)
    """(width, height)"""
    problem: ImageError | None = None
    """Where the picture as a whole cannot be used."""


def _read_pictures(
    pictures: str, labels: str, listing: Callable[[str], Collection[str]]
) -> tuple[list[_Picture], list[Rejection]]:
    """Pictures in the order of their names, and a rejection for each label file without one."""
    names = sorted(name for name in listing(pictures) if name.lower().endswith(PICTURES))
    if not names:
        raise DataError(
            f"{pictures}: no pictures ({', '.join(PICTURES)}) lie in it. Name the folder below it with "
            f"--data.train-split and --data.val-split, or put the pictures there."
        )
    there = {name for name in listing(labels) if name.endswith(".txt")}
    uses = Counter(map(_label_name, names))

    def look(image_id: int, name: str) -> _Picture:
        label = _label_name(name)
        content = read_file(join(labels, label)) if label in there else None
        try:
            size = _size(join(pictures, name), label, content, uses[label] > 1)
        except ImageError as error:
            return _Picture(image_id, name, content, problem=error)
        return _Picture(image_id, name, content, size)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(look, range(1, len(names) + 1), names))
    orphans = []
    for image_id, label in enumerate(sorted(there - set(uses)), start=len(names) + 1):
        people = len(read_file(join(labels, label)).split(b"\n")) - 1
        detail = "a label file without its picture"
        orphans.append(Rejection("missing_image", printable(label), image_id, None, detail, people))
    return found, orphans


def _label_name(picture: str) -> str:
    return f"{picture.rpartition('.')[0]}.txt"


def _size(path: str, label: str, content: bytes | None, shared: bool) -> tuple[int, int]:
    """(width, height) by the header. ImageError where the picture or its whole label cannot be used."""
    header, _ = open_header(path)
    if printable(label) != label:
        raise ImageError("path_outside_root", "the file's name is no text: rename it")
    if shared:
        raise ImageError("label_shared", f"another picture has the label file {label} too")
    if header.orientation != 1:
        detail = f"EXIF orientation {header.orientation}: turn the pixels themselves"
        raise ImageError("exif_rotated", detail)
    try:
        (content or b"").decode()
    except UnicodeDecodeError as error:
        raise ImageError("label_unreadable", f"{label}: not text at byte {error.start}") from None
    return header.width, header.height


def _lines(
    text: str, classes: Collection[int], passed: Counter[str], others: Counter[int]
) -> list[tuple[int, list[str]]]:
    """(line number, fields) of people, and of lines whose class is no number; those of other classes (by
    class in `others`) and repeated ones are counted in `passed`."""
    found: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = tuple(line.split())
        kind = _number(fields[0]) if fields else ""
        if fields in found:
            passed["duplicates"] += 1
        elif isinstance(kind, float) and kind.is_integer() and kind not in classes:
            passed["other_category"] += 1
            others[int(kind)] += 1
        elif fields:
            found[fields] = number
    return [(number, list(fields)) for fields, number in found.items()]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _row(
    fields: list[str], picture: _Picture, skeleton: Skeleton, dimensions: int, passed: Counter[str]
) -> tuple[list[Any], list[Any]]:
    """A line as bbox and keypoints of a COCO annotation, in px. What is no fraction from 0 to 1 becomes a
    text that says so, and `judge` rejects the row by its kind."""
    box, points = fields[1:5], fields[5:]
    if len(points) != dimensions * skeleton.num_keypoints:
        return box, points if len(box) == 4 else [""]  # a box alone is somebody without keypoints
    size = picture.size
    bbox = [_px(text, side, passed) for text, side in zip(box, 2 * size, strict=True)]
    x, y, w, h = bbox
    if not any(isinstance(value, str) for value in bbox):
        bbox = [x - w / 2, y - h / 2, w, h]  # type: ignore[operator]
    keypoints: list[float | str] = []
    for start in range(0, len(points), dimensions):
        place = points[start : start + 2]
        visible = _number(points[start + 2]) if dimensions == 3 else _shown(place)
        for text, side in zip(place, size, strict=True):
            keypoints.append(_px(text, side, passed) if visible != 0 else _number(text))  # to be dropped
        keypoints.append(visible)
    return bbox, keypoints


def _shown(place: list[str]) -> float:
    """v of a keypoint of two numbers: none at (0, 0) or below 0, as ultralytics has it; else seen."""
    x, y = map(_number, place)
    numbers = isinstance(x, float) and isinstance(y, float)
    return 0.0 if numbers and (x < 0 or y < 0 or x == y == 0) else 2.0  # type: ignore[operator]


def _px(text: str, side: int, passed: Counter[str]) -> float | str:
    """A fraction in px, moved inside by a hair where it must be."""
    value = _number(text)
    if isinstance(value, str):
        return value
    inside = min(max(value, 0.0), 1.0)
    if inside != value and abs(inside - value) <= HAIR:
        passed["fractions_clipped"] += 1
        value = inside
    return value * side if value == inside else f"{text}, outside 0 to 1"
