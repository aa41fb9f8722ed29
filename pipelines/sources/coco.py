"""COCO keypoint files in: the table of people, with a reason for each one left out.

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
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from hrnet_core.errors import DataError
from hrnet_core.locations import is_uri
from hrnet_core.skeleton import Skeleton
from pipelines.sources.layout import annotations_of
from pipelines.sources.records import GroundTruth, Photo, Rejection, Split, on_photos
from pipelines.sources.rows import (
    Annotation,
    ImageEntry,
    Judged,
    image_problem,
    is_number,
    judge,
    listed,
    name_difference,
    printable,
)
from pipelines.storage import absolute, file_sizes, is_file, is_folder, join, list_files, read_file


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


class Wanted(NamedTuple):
    """What a caller needs of a file's category, and what to do where it is of another skeleton."""

    names: bool
    """The names of its keypoints must be stated: where they are not, only their number could be compared."""
    way_out: str


TO_CROP = Wanted(
    True,
    "give the skeleton of this file with --data.skeleton FILE.json, or bring its keypoints into that order",
)
TO_SCORE = Wanted(False, "name the skeleton of this data (--skeleton FILE.json, docs/skeletons.md)")
Annotations = str | Path | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class AnnotatedFile:
    """A COCO keypoint file, read: everyone of the category that the skeleton is of."""

    name: str
    sha256: str
    images: dict[int, ImageEntry]
    """By id, in order."""
    judged: Judged
    category: Mapping[str, Any]
    """As the file has it."""

    @property
    def truth(self) -> GroundTruth:
        crowding = [image.crowdIndex for image in self.images.values()]
        known = bool(crowding) and all(map(is_number, crowding))
        return GroundTruth(
            name=self.name,
            image_ids=np.array(list(self.images), np.int64),
            people=self.judged.people,
            category_id=self.category["id"],
            crowd_index=np.array(crowding, np.float64) if known else None,
            has_areas=self.judged.has_areas,
            unscorable=tuple(self.judged.unscorable),
        )


@collector_paused()
def read_annotations(file: Annotations, skeleton: Skeleton | None, wanted: Wanted = TO_CROP) -> AnnotatedFile:
    """The one reader of a COCO keypoint file: a path, a URI, a .json.gz, or what such a file holds.

    skeleton: whose keypoints they must be; None takes those that the file's category names.

    DataError where the file or its index is wrong as a whole: people are judged one by one.
    """
    name, sha256, content = "the ground truth", "", file
    if isinstance(file, str | Path):
        name = str(file)
        content, sha256 = load(name, AnnotationFile)
    data = content if isinstance(content, AnnotationFile) else _sections(name, content)
    category = _person_category(name, data.categories, skeleton, wanted)
    images = _images(name, data)
    annotations = _annotations(name, data, images)
    ours = [a for a in annotations if a.category_id == category["id"]]
    judged = judge(ours, images, len(skeleton.keypoints if skeleton else category["keypoints"]))
    if len(ours) < len(annotations):
        judged.repaired["other_category"] = len(annotations) - len(ours)
    return AnnotatedFile(name, sha256, dict(sorted(images.items())), judged, category)


def people_of_images(file: str, content: Any) -> list[tuple[ImageEntry, list[Annotation]]]:
    """Every picture of an annotation file with its people, without crowds, in the file's order: for who asks
    for boxes alone. Keypoints, categories and ids of annotations may be missing.

    content: as `load` gave it (AnnotationFile). DataError as in `read_annotations`.
    """
    data = content
    if not isinstance(content, AnnotationFile):
        data = _sections(file, {"annotations": [], "categories": [], **content})
    images = _images(file, data)
    _refuse_lost(file, data.annotations, "image_id", images)
    categories = [c.get("id") for c in _people(data.categories, names=False)]
    people: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    for row in data.annotations:
        if not row.iscrowd and (not categories or row.category_id in categories):
            people[row.image_id].append(row)
    return [(image, people[image_id]) for image_id, image in images.items()]


def read_coco(root: str | Path, split: str, skeleton: Skeleton, wanted: Wanted = TO_CROP) -> Split:
    """ROOT/annotations/person_keypoints_SPLIT.json and the listing of ROOT/SPLIT/; ROOT may be a URI.

    DataError where the folder, the file or its index is wrong as a whole. A photo's place comes from its
    file_name, never from its id. A missing picture costs a rejection only if it had people.
    """
    root = absolute(str(root))  # workers may run elsewhere
    annotation_file = annotations_of(root, split)
    pictures = join(root, split)
    _check_folders(root, split, annotation_file, pictures)
    read = read_annotations(annotation_file, skeleton, wanted)
    judged = read.judged
    people = judged.people[judged.usable]
    counts = {image_id: rows.stop - rows.start for image_id, rows in people.by_image().items()}
    photos, rejected = [], list(judged.rejected)
    listing = _Listing(pictures)
    for image_id, image in read.images.items():
        name, count = image.file_name, counts.get(image_id, 0)
        problem = image_problem(image) or listing.problem(name, needed=count > 0)
        if problem:
            rejected.append(Rejection(problem[0], printable(name), image_id, None, problem[1], count))
        else:
            photos.append(Photo(image_id, name, join(pictures, name), image.width, image.height))
    return Split(
        name=split,
        annotation_file=annotation_file,
        annotation_sha256=read.sha256,
        photos=tuple(photos),
        people=on_photos(people, photos),
        truth=read.truth,
        rejected=tuple(sorted(rejected, key=attrgetter("order"))),
        repaired=judged.repaired,
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
            f"here annotations/ holds {listed(there) or 'no JSON file'}. Check --data.root and the split."
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


def load(file: str | Path, kind: Any = Any) -> tuple[Any, str]:
    """Parsed JSON (`kind`, if it is of that kind) and the sha256 of the bytes. Errors say at which byte."""
    way_out = "The file is damaged or incomplete: copy or unpack it again."
    try:
        raw = read_file(str(file))
        if str(file).endswith(".gz"):
            raw = gzip.decompress(raw)
        return _parsed(raw, kind), hashlib.sha256(raw).hexdigest()
    except (OSError, EOFError) as error:
        problem, way_out = (
            f"cannot be read ({getattr(error, 'strerror', None) or error})",
            "Check its name and its rights.",
        )
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
    return msgspec.convert(
        {name: content[name] for name in ("images", "annotations", "categories")}, AnnotationFile
    )


def _person_category(
    file: str, categories: list[dict[str, Any]], skeleton: Skeleton | None, wanted: Wanted
) -> dict[str, Any]:
    """The category that is read, after its keypoint names were compared with the skeleton's."""
    people = _people(categories, wanted.names)
    if len(people) != 1 or not isinstance(people[0].get("id"), int):
        raise DataError(
            f"{file}: field 'categories' has {len(people)} categories that list their keypoints; one is "
            f"needed, with an integer id and the keypoint names in order. Give person_keypoints_*.json "
            f"(instances_*.json has none), or add the list of names."
        )
    category = people[0]
    if skeleton is None:
        return category
    ours = list(skeleton.keypoints)
    theirs = [str(name) for name in category.get("keypoints", ours)]
    if list(map(_plain, theirs)) != list(map(_plain, ours)):
        raise DataError(
            f"{file}: categories[{category.get('name')!r}].keypoints is not skeleton {skeleton.name!r}: "
            f"{name_difference(theirs, ours)}. Every number would go to the wrong joint: {wanted.way_out}."
        )
    return category


def _people(categories: list[dict[str, Any]], names: bool) -> list[dict[str, Any]]:
    """The categories that people are of: those named person, else those with keypoints, else all. names:
    only such as name their keypoints."""
    with_keypoints = [c for c in categories if isinstance(c.get("keypoints"), list)]
    candidates = with_keypoints if names else categories
    return [c for c in candidates if c.get("name") == "person"] or with_keypoints or candidates


def _plain(name: str) -> str:
    """ "Left Eye", "left-eye" and "left_eye" are one name."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _images(file: str, data: AnnotationFile) -> dict[int, ImageEntry]:
    return dict(zip(_ids(file, "images", data.images), data.images, strict=True))


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
            f"{file}: {len(twice)} ids stand more than once in {section!r}: {listed(twice)}. Which entry is "
            f"meant cannot be known: make the ids unique."
        )
    return ids


def _annotations(file: str, data: AnnotationFile, images: Mapping[int, ImageEntry]) -> list[Annotation]:
    """All annotations in order of (image_id, id), none without its image or category."""
    annotations = data.annotations
    _ids(file, "annotations", annotations)
    _refuse_lost(file, annotations, "image_id", images)
    _refuse_lost(file, annotations, "category_id", {c.get("id") for c in data.categories})
    return sorted(annotations, key=attrgetter("image_id", "id"))


def _refuse_lost(file: str, annotations: Sequence[Annotation], key: str, known: Collection[Any]) -> None:
    """DataError where annotations refer to an image or category that is not there."""
    of = attrgetter(key)
    lost = [a.id for a in annotations if type(of(a)) is not int or of(a) not in known]
    if lost:
        raise DataError(
            f"{file}: {len(lost)} annotations have an {key} that the file does not define: annotation "
            f"ids {listed(lost)}. Remove them, or add what they refer to."
        )


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
