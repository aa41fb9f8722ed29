"""COCO keypoint files in: person records, with a reason for each one left out. Poses out: COCO results.

Decided here, on the JSON and the folder's listing alone (pictures are opened by who uses them):

    fatal      the file or its index cannot be trusted: unreadable JSON, no person category, other keypoint
               names, duplicate or dangling ids -> DataError
    rejected   one picture or person cannot be used -> a Rejection with its reason
    protocol   crowds and people without keypoints take no part in training (official coco.py:158-182) ->
               a Rejection too, but no defect
    repaired   harmless contradictions, made consistent and counted
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrnet_core.errors import DataError
from hrnet_core.geometry import sanitize_boxes
from hrnet_core.skeleton import Skeleton
from pipelines.paths import absolute, file_sizes, is_file, is_folder, is_uri, join, list_files, read_file

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


# ---------------------------------------------------------------------------------- annotations


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


class AnnotationFile(msgspec.Struct, gc=False):
    """The three sections of a COCO file that are read."""

    images: list[ImageEntry]
    annotations: list[Annotation]
    categories: list[dict[str, Any]]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python's search for garbage off: it walks over all objects again and again while annotations become
    hundreds of thousands of them, none of which is garbage. Worth a quarter of the reading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def annotations_of(root: str, split: str) -> str:
    """The annotation file of a split; `root` is a path or URI."""
    return join(absolute(root), f"annotations/person_keypoints_{split}.json")


@collector_paused()
def read_coco(root: str | Path, split: str, skeleton: Skeleton) -> CocoSplit:
    """ROOT/annotations/person_keypoints_SPLIT.json and the listing of ROOT/SPLIT/; ROOT may be a URI.

    DataError where the folder, the file or its index is wrong as a whole. A photo's place comes from its
    file_name, never from its id. A missing picture costs a rejection only if it had people.
    """
    root = absolute(str(root))  # workers may run elsewhere
    annotation_file = annotations_of(root, split)
    pictures = join(root, split)
    _check_folders(root, split, annotation_file, pictures)
    content, sha256 = _load(annotation_file, AnnotationFile)
    data = content if isinstance(content, AnnotationFile) else _sections(annotation_file, content)
    category_id = _person_category(annotation_file, data.categories, skeleton)
    images = dict(zip(_ids(annotation_file, "images", data.images), data.images, strict=True))
    annotations = _annotations(annotation_file, data, images)
    ours = [a for a in annotations if a.category_id == category_id]
    people, rejected, repaired = people_of(ours, images, skeleton.num_keypoints)
    if len(ours) < len(annotations):
        repaired["other_category"] = len(annotations) - len(ours)

    photos = []
    listing = _Listing(pictures)
    for image_id, image in sorted(images.items()):
        name, here = image.file_name, tuple(people.get(image_id, ()))
        problem = _image_problem(image) or listing.problem(name, needed=bool(here))
        if problem:
            rejected.append(Rejection(problem[0], printable(name), image_id, None, problem[1], len(here)))
        else:
            place = join(pictures, name)
            photos.append(Photo(image_id, name, place, image.width, image.height, here))
    rejected.sort(key=lambda r: (r.image_id, -1 if r.ann_id is None else r.ann_id))
    return CocoSplit(
        name=split,
        annotation_file=annotation_file,
        annotation_sha256=sha256,
        photos=tuple(photos),
        rejected=tuple(rejected),
        repaired=repaired,
        category_id=category_id,
    )


def _check_folders(root: str, split: str, annotation_file: str, pictures: str) -> None:
    if not is_folder(root):
        raise DataError(f"{root} is not a folder: give the root of a COCO set (preprocess: --data.root).")
    if not is_file(annotation_file):
        there = sorted(n for n in list_files(join(root, "annotations")) if n.endswith(".json"))
        if not there and (is_folder(join(root, "labels")) or is_file(join(root, "data.yaml"))):
            raise DataError(
                f"{root}: YOLO-pose labels (labels/ or data.yaml, no annotations/). Preprocess takes them "
                f"with --data.format yolo_pose. They have no areas and no crowds: an AP on them would not "
                f"be COCO's, so evaluate wants COCO annotations."
            )
        raise DataError(
            f"{annotation_file}: no such file. A COCO root has annotations/person_keypoints_{split}.json; "
            f"here annotations/ holds {_listed(there) or 'no JSON file'}. Check --data.root and the split."
        )
    if not is_folder(pictures):
        raise DataError(
            f"{pictures}: no such folder. The pictures of split {split!r} are looked for in {split}/ beside "
            f"annotations/. Check --data.root, or unpack the pictures there."
        )


def _parsed(raw: bytes, kind: Any) -> Any:
    """JSON as `kind`. What msgspec does not take as that is given as Python's own parser reads it: a file
    with NaN in it (refused person by person), of another kind, or, with the place told, no JSON."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError:
        return json.loads(raw.decode())


def _load(file: str | Path, kind: Any = Any) -> tuple[Any, str]:
    """Parsed JSON (`kind`, if it is of that kind) and the sha256 of the bytes. Errors say at which byte."""
    way_out = "The file is damaged or incomplete: copy or unpack it again."
    try:
        raw = read_file(str(file))
        return _parsed(raw, kind), hashlib.sha256(raw).hexdigest()
    except OSError as error:
        problem, way_out = f"cannot be read ({error.strerror})", "Check its name and its rights."
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text at byte {error.start:,}"
    except json.JSONDecodeError as error:
        place = len(error.doc[: error.pos].encode())
        problem = f"not valid JSON at byte {place:,} of {len(raw):,} ({error.msg})"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON that can be read ({error})"
    except MemoryError:
        (size,) = file_sizes([str(file)])
        problem = f"{size:,} bytes, more than the memory here can hold (up to ten times its size is needed)"
        way_out = "Give the machine more memory, or take out annotations that no person has."
    raise DataError(f"{file}: {problem}. {way_out}")


def _sections(file: str, content: Any) -> AnnotationFile:
    """The sections of plain JSON."""
    if not isinstance(content, dict):
        raise DataError(
            f"{file}: a COCO annotation file is one JSON object with images, annotations and categories, "
            f"this is a {type(content).__name__}. Result and detection files are not annotations."
        )
    for name in ("images", "annotations", "categories"):
        rows = content.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            what = "is missing" if rows is None else "is not a list of objects"
            raise DataError(f"{file}: field {name!r} {what}. Give a COCO keypoint annotation file.")
    return msgspec.convert(content, AnnotationFile)


def _person_category(file: str, categories: list[dict[str, Any]], skeleton: Skeleton) -> int:
    """Id of the category that is read, after its keypoint names were compared with the skeleton's."""
    with_keypoints = [c for c in categories if isinstance(c.get("keypoints"), list)]
    people = [c for c in with_keypoints if c.get("name") == "person"] or with_keypoints
    if len(people) != 1 or not isinstance(people[0].get("id"), int):
        raise DataError(
            f"{file}: field 'categories' has {len(people)} categories that list their keypoints; one is "
            f"needed, with an integer id and the keypoint names in order. Give person_keypoints_*.json "
            f"(instances_*.json has none), or add the list of names."
        )
    category = people[0]
    theirs, ours = [str(name) for name in category["keypoints"]], list(skeleton.keypoints)
    if theirs != ours:
        raise DataError(
            f"{file}: categories[{category.get('name')!r}].keypoints is not skeleton {skeleton.name!r}: "
            f"{name_difference(theirs, ours)}. Every number would go to the wrong joint: give the skeleton "
            f"of this file with --data.skeleton FILE.json, or bring its keypoints into that order."
        )
    return int(category["id"])


def name_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    if len(theirs) != len(ours):
        missing, unknown = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        return f"{len(theirs)} keypoints instead of {len(ours)} (missing {missing}, unknown {unknown})"
    pairs = enumerate(zip(theirs, ours, strict=True))
    differing = [f"position {i} has {a!r} instead of {b!r}" for i, (a, b) in pairs if a != b]
    places = _listed(differing, shown=len(ours))
    return f"{'the same names in another order' if set(theirs) == set(ours) else 'other names'}: {places}"


def _ids(file: str, section: str, rows: Sequence[ImageEntry | Annotation]) -> list[int]:
    """Unique integer ids, or DataError: COCO's own index silently keeps the last of two."""
    ids = [row.id for row in rows]
    for index, identity in enumerate(ids):
        if type(identity) is not int or not -(2**63) <= identity < 2**63:  # they are stored as int64
            raise DataError(
                f"{file}: {section}[{index}].id is {identity!r}, no integer of 64 bits. Give each entry one "
                f"of its own."
            )
    if len(set(ids)) != len(ids):
        twice = sorted(i for i, n in Counter(ids).items() if n > 1)
        raise DataError(
            f"{file}: {len(twice)} ids stand more than once in {section!r}: {_listed(twice)}. Which entry is "
            f"meant cannot be known: make the ids unique."
        )
    return ids


def _annotations(file: str, data: AnnotationFile, images: Mapping[int, ImageEntry]) -> list[Annotation]:
    """All annotations in order of (image_id, id), none without its image or category."""
    annotations = data.annotations
    _ids(file, "annotations", annotations)
    known = {"image_id": images.keys(), "category_id": {c.get("id") for c in data.categories}}
    for key, ids in known.items():
        of = attrgetter(key)
        lost = [a.id for a in annotations if type(of(a)) is not int or of(a) not in ids]
        if lost:
            raise DataError(
                f"{file}: {len(lost)} annotations have an {key} that the file does not define: annotation "
                f"ids {_listed(lost)}. Remove them, or add what they refer to."
            )
    return sorted(annotations, key=attrgetter("image_id", "id"))


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
    no_area = [not (_is_number(area) and area > 0) for area in areas]
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
    strange = [next((repr(v) for v in row if not _is_number(v)), "") for row in values]
    problems.mark([bool(s) for s in strange], no_number, lambda i: f"{key} has {strange[i]}")
    cleared = [[0] * length if s else row for row, s in zip(values, strange, strict=True)]
    return np.array(cleared, np.float64).reshape(len(rows), length)


def _kind(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else type(value).__name__


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # NaN compares False


def _sizes(
    rows: Sequence[Annotation], images: Mapping[int, ImageEntry]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Width and height of each row's picture; endless where the picture itself is out."""
    usable = {i: (image.width, image.height) for i, image in images.items() if not _image_problem(image)}
    endless = (LARGEST, LARGEST)
    sizes = np.array([usable.get(row.image_id, endless) for row in rows], np.float64).reshape(-1, 2)
    return sizes[:, 0], sizes[:, 1]


# ---------------------------------------------------------------------------------- pictures


def _image_problem(image: ImageEntry) -> tuple[str, str] | None:
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


class _Listing:
    """What lies in the split's folder, listed once a folder: 118,000 single looks would take longer."""

    def __init__(self, pictures: str) -> None:
        self._pictures = pictures
        self._inside = [os.path.realpath(folder) for folder in (pictures, os.path.dirname(pictures))]
        self._folders: dict[str, dict[str, bool] | None] = {}

    def problem(self, file_name: str, needed: bool) -> tuple[str, str] | None:
        """(reason, detail) where the picture is needed and not there, or a link that leads elsewhere."""
        folder, _, name = file_name.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._list(join(self._pictures, folder) if folder else self._pictures)
        listing = self._folders[folder]
        if listing is None or (listing.get(name) and not self._is_inside(f"{self._pictures}/{file_name}")):
            return "path_outside_root", "a symbolic link leads out of the COCO folder"
        if name in listing or not needed:
            return None
        twin = next((other for other in listing if other.lower() == name.lower()), None)
        return "missing_image", f"upper and lower case differ: there is {twin!r}" if twin else "no such file"

    def _list(self, folder: str) -> dict[str, bool] | None:
        """Name -> is a link, of the files in a folder; None for a folder that is elsewhere. What is no file
        (a pipe, a device) is not there: opening it might never end."""
        if is_uri(folder):
            return dict.fromkeys(list_files(folder), False)
        if not os.path.isdir(folder):
            return {}
        if not self._is_inside(folder):
            return None
        try:
            with os.scandir(folder) as entries:
                return {e.name: e.is_symlink() for e in entries if e.is_symlink() or e.is_file()}
        except OSError as error:
            raise DataError(
                f"{folder}: the pictures cannot be listed ({error.strerror}). Check the rights of the folder."
            ) from None

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return any(os.path.commonpath([real, folder]) == folder for folder in self._inside)


# ---------------------------------------------------------------------------------- detections


def read_detections(file: str | Path, split: CocoSplit, score_threshold: float = 0.0) -> CocoSplit:
    """`split` with the people of a detector: a JSON list of {image_id, category_id, bbox xywh, score}.

    Kept are entries of the split's category with score >= score_threshold, boxes as given (never
    sanitised), keypoints and visible zero; ann_id is the index in the file (official coco.py:246-287).
    Entries whose box is no box are rejected. DataError where the file is of another kind, names images
    that the split does not have, or leaves no box.
    """
    file = Path(file)
    rows, _ = _load(file)
    _check_detections(file, rows)
    num_keypoints = next((len(p.visible) for photo in split.photos for p in photo.people), 0)
    photos = {photo.image_id: photo for photo in split.photos}
    gone = {r.image_id for r in split.rejected if r.ann_id is None}
    unknown = sorted({r["image_id"] for r in rows} - photos.keys() - gone)
    if unknown:
        raise DataError(
            f"{file}: {len(unknown)} image ids are not in {split.annotation_file}: {_listed(unknown)}. These "
            f"detections are of other pictures: give the file made for split {split.name!r}."
        )
    rejected = [r for r in split.rejected if r.ann_id is None]
    nothing = np.zeros((num_keypoints, 2), np.float32), np.zeros(num_keypoints, np.float32)
    found: dict[int, list[Person]] = {}
    for index, row in enumerate(rows):
        if (
            row["category_id"] != split.category_id
            or row["score"] < score_threshold
            or row["image_id"] in gone
        ):
            continue
        photo, box = photos[row["image_id"]], row["bbox"]
        if len(box) != 4 or not all(map(_is_number, box)) or not (box[2] > 0 and box[3] > 0):
            detail = f"bbox {box} of entry {index} is not x, y and a positive w, h"
            rejected.append(Rejection("bbox_invalid", photo.file_name, photo.image_id, index, detail))
            continue
        area, score = float(box[2] * box[3]), float(row["score"])
        person = Person(photo.image_id, index, np.array(box, np.float32), *nothing, area, score)
        found.setdefault(photo.image_id, []).append(person)
    if not found:
        raise DataError(
            f"{file}: no box is left of {len(rows)} entries (category {split.category_id}, score at least "
            f"{score_threshold:g}). Lower --evaluate.score-threshold, or give a file with person detections."
        )
    new = [replace(photo, people=tuple(found.get(photo.image_id, ()))) for photo in split.photos]
    return replace(split, photos=tuple(new), rejected=tuple(rejected))


def _check_detections(file: Path, rows: Any) -> None:
    """DataError unless `rows` is a list of detection entries; boxes are looked at one by one later."""
    wanted = 'a detection file is a JSON list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}'
    if not isinstance(rows, list):
        hint = ": an annotation file" if isinstance(rows, dict) and "annotations" in rows else ""
        raise DataError(f"{file}: {wanted}, this is a {type(rows).__name__}{hint}.")
    if not rows:
        raise DataError(f"{file}: no entries; {wanted}. Run the detector again, or evaluate without --boxes.")
    kinds = {"image_id": (int,), "category_id": (int,), "bbox": (list,), "score": (int, float)}
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file}: entry {index} is a {type(row).__name__}; {wanted}.")
        for key, types in kinds.items():
            if type(row.get(key)) not in types:
                hint = " (these are keypoint results?)" if key == "bbox" and "keypoints" in row else ""
                raise DataError(f"{file}: entry {index}, field {key!r} is {row.get(key)!r}{hint}; {wanted}.")
        if not _is_number(row["score"]):
            raise DataError(
                f"{file}: entry {index}, field 'score' is {row['score']!r}; a finite number is needed."
            )


# ---------------------------------------------------------------------------------- results


def poses_to_results(
    image_ids: ArrayLike,
    instance_ids: ArrayLike,
    keypoints: ArrayLike,
    keypoint_scores: ArrayLike,
    scores: ArrayLike,
    category_id: int = 1,
) -> list[dict[str, Any]]:
    """COCO keypoint results, sorted by (image_id, instance id): AP depends on the order of equal scores.

    image_ids, instance_ids int (P,); keypoints (P, K, 2) in photo px; keypoint_scores (P, K); scores (P,),
    the person's. Numbers become float64. DataError where one is not finite.
    """
    image_ids, instance_ids = np.asarray(image_ids, np.int64), np.asarray(instance_ids, np.int64)
    order = np.lexsort((instance_ids, image_ids))
    parts = [np.asarray(keypoints, np.float64), np.asarray(keypoint_scores, np.float64)[..., None]]
    triples = np.concatenate(parts, axis=-1)[order]
    triples, totals = triples.reshape(len(order), -1), np.asarray(scores, np.float64)[order]
    strange = ~(np.isfinite(triples).all(axis=1) & np.isfinite(totals))
    if strange.any():
        where = image_ids[order][strange]
        raise DataError(
            f"results: {strange.sum()} poses have coordinates or scores that are not finite, the first in "
            f"image {where[0]}. The model that made them has diverged, or its checkpoint is damaged."
        )
    rows = zip(image_ids[order].tolist(), triples.tolist(), totals.tolist(), strict=True)
    return [{"image_id": i, "category_id": category_id, "keypoints": k, "score": s} for i, k, s in rows]


def _listed(items: Sequence[Any], shown: int = 10) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more
