"""YOLO-pose labels in: the same person records as from COCO, with a reason for each one left out.

    ROOT/images/SPLIT/*.jpg      ROOT/labels/SPLIT/*.txt, a line a person, all as fractions of the picture:
                                 class  cx cy w h  K x (x y v)
    ROOT/data.yaml               optional, as ultralytics has it: train, val, names, kpt_shape, flip_idx,
                                 kpt_names

The labels say less than COCO's: no size of the picture (read from its header), no crowds, no area. The
area is BOX_AREA of the box, counted as a repair: good enough to train with, not for an AP.

They belong to the displayed picture (ultralytics applies EXIF), while crops are cut from stored pixels: a
picture that EXIF turns is rejected. The fields themselves are judged by `judge`, as COCO's are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hrnet_core.errors import DataError, ImageError
from hrnet_core.images import read_header
from hrnet_core.skeleton import Skeleton
from pipelines.sources.media import PICTURES
from pipelines.sources.records import GroundTruth, Photo, Rejection, Split, on_photos
from pipelines.sources.rows import Annotation, ImageEntry, judge, name_difference, printable
from pipelines.storage import absolute, is_folder, join, list_files, read_file

DESCRIPTION = "data.yaml"
FLAT = "all"
"""The split of the pictures that lie in images/ itself."""
HEADER = 1 << 16
"""Bytes that hold nearly every picture's header."""


def read_yolo(root: str | Path, split: str, skeleton: Skeleton) -> Split:
    """Pictures and labels of a split ("all": of images/ itself); ROOT may be a URI.

    Pictures are numbered from 1 in the order of their names, people in the order of pictures and lines.
    Reasons beyond read_coco's: no_label and empty_label (a picture without people; no defect),
    class_invalid, label_unreadable, label_shared (two pictures of one name) and exif_rotated.
    DataError where data.yaml contradicts the skeleton, or the folders are not those of such a set.
    """
    root = absolute(str(root))
    description, raw = _description(root, skeleton)
    person = _person_class(root, description)
    pictures, labels = _folders(root, split, description)
    found, rejected = _read_pictures(pictures, labels)
    digest = hashlib.sha256(raw)
    images: dict[int, ImageEntry] = {}
    rows: list[Annotation] = []
    origin: dict[int, str] = {}
    passed: Counter[str] = Counter()
    for one in found:
        content, label = one.content or b"", _label_name(one.name)
        digest.update(f"{printable(one.name)}\0{len(content)}\0".encode() + content)
        lines = _lines(content.decode(errors="replace"), person, passed)
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
            if _number(fields[0]) == person:
                bbox, keypoints = _row(fields, one, skeleton)
                rows.append(Annotation(identity, one.image_id, bbox=bbox, keypoints=keypoints))
            else:
                detail = f"{origin[identity]}: class {fields[0]!r} is no number"
                rejected.append(Rejection("class_invalid", one.name, one.image_id, identity, detail))
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


# ---------------------------------------------------------------------------------- data.yaml


def _description(root: str, skeleton: Skeleton) -> tuple[dict[str, Any], bytes]:
    """data.yaml and its bytes, after it was compared with the skeleton; nothing where there is none."""
    file = join(root, DESCRIPTION)
    try:
        raw = read_file(file)
        fields = yaml.safe_load(raw.decode()) or {}
    except (FileNotFoundError, NotADirectoryError):
        return {}, b""
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not a readable YAML file ({' '.join(str(error).split())}).") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file}: a description is a mapping with train, val, names and kpt_shape.")
    shape = fields.get("kpt_shape", [skeleton.num_keypoints, 3])
    if shape != [skeleton.num_keypoints, 3]:
        raise DataError(
            f"{file}: kpt_shape is {shape}, skeleton {skeleton.name!r} needs [{skeleton.num_keypoints}, 3]. "
            f"Name the skeleton of these labels with --data.skeleton, and export them with visibility."
        )
    names = fields.get("kpt_names")
    for theirs in names.values() if isinstance(names, dict) else [names]:
        if theirs is not None and theirs != list(skeleton.keypoints):
            difference = name_difference(list(map(str, theirs)), skeleton.keypoints)
            raise DataError(
                f"{file}: kpt_names is not skeleton {skeleton.name!r}: {difference}. Every number would go "
                f"to the wrong joint: give the skeleton of these labels with --data.skeleton FILE.json."
            )
    # flip_idx is all that most label sets say about the order of their keypoints.
    ours = skeleton.flip_order.tolist()
    theirs = fields.get("flip_idx", ours)
    if theirs not in (None, ours):
        raise DataError(
            f"{file}: flip_idx is not the mirror image of skeleton {skeleton.name!r}: "
            f"{_mirror_difference(theirs, ours, skeleton)}. The labels have another order of keypoints: give "
            f"their skeleton with --data.skeleton FILE.json."
        )
    return fields, raw


def _mirror_difference(theirs: Any, ours: list[int], skeleton: Skeleton) -> str:
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return f"not {len(ours)} indices"
    names = dict(enumerate(skeleton.keypoints))
    pairs = enumerate(zip(theirs, ours, strict=True))
    return ", ".join(
        f"{names[i]} ({i}) becomes {names.get(a, a)} ({a}) instead of {names[b]} ({b})"
        for i, (a, b) in pairs
        if a != b
    )


def _person_class(root: str, description: Mapping[str, Any]) -> int:
    """The class that is read: the one called person, or the only one; 0 where nothing is said."""
    names = description.get("names", ["person"])
    named = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(named, dict) or not named:
        raise DataError(f"{join(root, DESCRIPTION)}: names is {names!r}, not the names of the classes.")
    people = [number for number, name in named.items() if name == "person"] or list(named)
    if len(people) != 1 or type(people[0]) is not int:
        raise DataError(
            f"{join(root, DESCRIPTION)}: names has the classes {list(named.values())}, none or several of "
            f"them 'person'. Call the class whose keypoints are to be read 'person'."
        )
    return people[0]


def _folders(root: str, split: str, description: Mapping[str, Any]) -> tuple[str, str]:
    """Folder of the pictures and of the labels: as data.yaml says, else images/SPLIT and labels/SPLIT."""
    entry = description.get(split, "images" if split == FLAT else f"images/{split}")
    file = join(root, DESCRIPTION)
    if not isinstance(entry, str) or entry.endswith(".txt"):
        raise DataError(
            f"{file}: {split} is {entry!r}; a folder of pictures is read, no list. Take {split} out of it "
            f"and put the pictures in images/{split}/ and the labels in labels/{split}/."
        )
    parts = [part for part in entry.split("/") if part not in ("", ".")]
    parts = parts[1:] if parts[:1] == [".."] else parts  # as ultralytics reads ../train/images
    if entry.startswith("/") or ".." in parts or "images" not in parts:
        raise DataError(
            f"{file}: {split} is {entry!r}; it must lead from the folder of {DESCRIPTION} to pictures inside "
            f"it, through a folder 'images' that has a 'labels' beside it."
        )
    place = len(parts) - 1 - parts[::-1].index("images")
    pictures = join(root, "/".join(parts))
    labels = join(root, "/".join([*parts[:place], "labels", *parts[place + 1 :]]))
    for folder in (root, pictures, labels):
        if not is_folder(folder):
            raise DataError(
                f"{folder}: no such folder. A YOLO-pose root has images/{split}/ and labels/{split}/, or "
                f"names them in {DESCRIPTION}. Where the pictures lie in images/ itself, give "
                f"--data.train-split {FLAT} and --data.val-split {FLAT}."
            )
    return pictures, labels


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


def _read_pictures(pictures: str, labels: str) -> tuple[list[_Picture], list[Rejection]]:
    """Pictures in the order of their names, and a rejection for each label file without one."""
    names = sorted(name for name in list_files(pictures) if name.lower().endswith(PICTURES))
    if not names:
        raise DataError(
            f"{pictures}: no pictures ({', '.join(PICTURES)}) lie in it. Name the folder below it with "
            f"--data.train-split and --data.val-split, or put the pictures there."
        )
    there = {name for name in list_files(labels) if name.endswith(".txt")}
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
    try:
        try:
            header = read_header(read_file(path, HEADER))
        except ImageError as error:
            if error.reason != "truncated":
                raise
            header = read_header(read_file(path))  # a long one
    except OSError as error:
        raise ImageError("unreadable", str(error.strerror)) from None
    if printable(label) != label:
        raise ImageError("path_outside_root", "the file's name is no text: rename it")
    if shared:
        raise ImageError("label_shared", f"another picture has the label file {label} too")
    if header.orientation != 1:
        turned = f"EXIF orientation {header.orientation}: turn the pixels themselves"
        raise ImageError("exif_rotated", turned)
    try:
        (content or b"").decode()
    except UnicodeDecodeError as error:
        raise ImageError("label_unreadable", f"{label}: not text at byte {error.start}") from None
    return header.width, header.height


def _lines(text: str, person: int, passed: Counter[str]) -> list[tuple[int, list[str]]]:
    """(line number, fields) of people, and of lines whose class is no number; those of other classes and
    repeated ones are counted in `passed`."""
    found: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not (fields := tuple(line.split())):
            continue
        if fields in found:
            passed["duplicates"] += 1
        elif _number(fields[0]) != person and isinstance(_number(fields[0]), float):
            passed["other_category"] += 1
        else:
            found[fields] = number
    return [(number, list(fields)) for fields, number in found.items()]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _row(fields: list[str], picture: _Picture, skeleton: Skeleton) -> tuple[list[Any], list[Any]]:
    """A line as bbox and keypoints of a COCO annotation, in px. What is no fraction from 0 to 1 becomes a
    text that says so, and `judge` rejects the row by its kind."""
    box, points = fields[1:5], fields[5:]
    if len(points) != 3 * skeleton.num_keypoints:
        return box, points
    width, height = picture.size
    bbox = [_px(text, side) for text, side in zip(box, (width, height) * 2, strict=True)]
    x, y, w, h = bbox
    if not any(isinstance(value, str) for value in bbox):
        bbox = [x - w / 2, y - h / 2, w, h]  # type: ignore[operator]
    keypoints: list[float | str] = []
    for px, py, shown in zip(points[::3], points[1::3], points[2::3], strict=True):
        visible = _number(shown)
        keypoints += [_px(px, width, visible != 0), _px(py, height, visible != 0), visible]
    return bbox, keypoints


def _px(text: str, side: int, checked: bool = True) -> float | str:
    """A fraction in px. Unchecked is the place of what is not labelled: it will be dropped."""
    value = _number(text)
    if isinstance(value, str):
        return value
    return value * side if 0 <= value <= 1 or not checked else f"{text}, outside 0 to 1"
