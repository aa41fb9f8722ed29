"""The one reader of COCO keypoint annotations: a file, or what it holds, becomes a table of people.

fatal      the file or its index cannot be trusted: unreadable JSON, no person category, other keypoint
           names, duplicate or dangling ids -> DataError
rejected   one person cannot be used -> a Rejection with its reason (rows.py)
protocol   crowds and people without keypoints take no part in training (official coco.py:158-182) ->
           a Rejection too, but no defect
repaired   what annotation tools write otherwise than COCO does, made plain and counted
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from hrnet_core.errors import DataError
from hrnet_core.files import json_kind
from hrnet_core.skeleton import Skeleton
from pipelines.sources.doubts import Seen
from pipelines.sources.json_file import load_marked
from pipelines.sources.records import GroundTruth, counted
from pipelines.sources.rows import (
    Annotation,
    ImageEntry,
    Judged,
    is_box,
    is_crowd,
    is_number,
    judge,
    listed,
    name_difference,
    whole,
)

logger = logging.getLogger(__name__)
SAME_PERSON = 0.5
"""IoU from which a box without keypoints is of the person under it."""
ALL = "all"
"""As the category asked for: every category of the skeleton."""


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
    category: str | None = None
    """Its name, or ALL; None: the one called person, or the only one."""
    flag: str = "--data.category"
    """What chooses it on the command line."""


TO_CROP = Wanted(
    True,
    "give the skeleton of this file with --data.skeleton FILE.json, or bring its keypoints into that order",
)
TO_SCORE = Wanted(
    False,
    "name the skeleton of this data (--skeleton FILE.json, docs/skeletons.md)",
    flag="--evaluate.category",
)
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
    """As the file has it; of several that were joined the first."""
    category_ids: frozenset[int]
    """Of it and of all that were joined with it."""

    @property
    def seen(self) -> Seen:
        """The usable people, for doubts.py."""
        people = self.judged.people[self.judged.usable]
        images = [self.images[image_id] for image_id in people.image_id.tolist()]
        sides = [side if is_number(side) else np.nan for i in images for side in (i.width, i.height)]
        return Seen(people, np.array(sides, np.float64).reshape(-1, 2), self.judged.has_areas)

    @property
    def truth(self) -> GroundTruth:
        crowding = [image.crowdIndex for image in self.images.values()]
        known = bool(crowding) and all(map(is_number, crowding))
        return GroundTruth(
            name=self.name,
            image_ids=np.array(list(self.images), np.int64),
            people=self.judged.people,
            category_ids=self.category_ids,
            crowd_index=np.array(crowding, np.float64) if known else None,
            has_areas=self.judged.has_areas,
            unscorable=tuple(self.judged.unscorable),
        )


@collector_paused()
def read_annotations(
    file: Annotations,
    skeleton: Skeleton | None,
    wanted: Wanted = TO_CROP,
    size_of: Callable[[ImageEntry], tuple[int, int] | None] = lambda _: None,
) -> AnnotatedFile:
    """The one reader of a COCO keypoint file: a path, a URI, a .json.gz, or what such a file holds.

    skeleton: whose keypoints they must be; None takes those that the file's category names. size_of: asked
    for the width and height of a picture whose entry has none.

    DataError where the file or its index is wrong as a whole: people are judged one by one.
    """
    name, sha256, content = "the ground truth", "", file
    repaired: Counter[str] = Counter()
    if isinstance(file, str | Path):
        name = str(file)
        content, sha256, marked = load_marked(name, AnnotationFile)
        repaired["byte_order_mark"] = int(marked)
    data = content if isinstance(content, AnnotationFile) else _sections(name, content)
    category, ids = _category(name, data.categories, skeleton, wanted)
    images = _images(name, data, repaired)
    for image in images.values():
        if image.width is None and image.height is None and (size := size_of(image)):
            image.width, image.height = size
            repaired["sizes_read"] += 1
    annotations = _annotations(name, data, images, repaired)
    ours = _without_box_labels([a for a in annotations if a.category_id in ids], repaired)
    judged = judge(ours, images, len(skeleton.keypoints if skeleton else category["keypoints"]))
    repaired["other_category"] = sum(a.category_id not in ids for a in annotations)
    judged.repaired.update({kind: number for kind, number in repaired.items() if number})
    return AnnotatedFile(name, sha256, dict(sorted(images.items())), judged, category, frozenset(ids))


def people_of_images(file: str, content: Any) -> list[tuple[ImageEntry, list[Annotation]]]:
    """Every picture of an annotation file with its people, without crowds, in the file's order: for who asks
    for boxes alone. Keypoints, categories and ids of annotations may be missing.

    content: as `load` gave it (AnnotationFile). DataError as in `read_annotations`.
    """
    data = content
    if not isinstance(content, AnnotationFile):
        data = _sections(file, {"annotations": [], "categories": [], **content})
    repaired: Counter[str] = Counter()
    images = _images(file, data, repaired)
    _refuse_lost(file, data.annotations, "image_id", images, repaired)
    if repaired.total():
        logger.info("%s: repaired: %s", file, counted(repaired))
    categories = [whole(c.get("id")) for c in _people(data.categories, names=False)]
    people: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    for row in data.annotations:
        if not is_crowd(row.iscrowd) and (not categories or whole(row.category_id) in categories):
            people[row.image_id].append(row)
    return [(image, people[image_id]) for image_id, image in images.items()]


def _sections(file: str, content: Any) -> AnnotationFile:
    """The sections of plain JSON."""
    if not isinstance(content, dict):
        raise DataError(
            f"{file}: a COCO annotation file is one JSON object with images, annotations and categories, "
            f"this is {json_kind(content)}. Result and detection files are not annotations."
        )
    for name in ("images", "annotations", "categories"):
        rows = content.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            what = "is missing" if rows is None else "is not a list of objects"
            raise DataError(f"{file}: field {name!r} {what}. Give a COCO keypoint annotation file.")
    return msgspec.convert(
        {name: content[name] for name in ("images", "annotations", "categories")}, AnnotationFile
    )


def _category(
    file: str, categories: list[dict[str, Any]], skeleton: Skeleton | None, wanted: Wanted
) -> tuple[dict[str, Any], set[int]]:
    """The category that is read, after its keypoint names were compared with the skeleton's; and all ids that
    are meant with it."""
    with_keypoints = _with_keypoints(categories)
    names = [str(c.get("name")) for c in with_keypoints]
    if wanted.category == ALL:
        ours = skeleton.keypoints if skeleton else with_keypoints[0]["keypoints"] if with_keypoints else ()
        fitting = [c for c in with_keypoints if _is_of(c, ours)] or with_keypoints[:1]
    elif wanted.category is not None:
        fitting = [c for c in with_keypoints if _plain(str(c.get("name"))) == _plain(wanted.category)]
        if not fitting:
            raise DataError(
                f"{file}: no category {wanted.category!r} has keypoints; {listed(names) or 'none'} have. "
                f"Name one of them with {wanted.flag}, or {ALL} for all of them."
            )
    else:
        fitting = _people(categories, wanted.names)
        kinds = {(_plain(str(c.get("name"))), str(c.get("keypoints"))) for c in fitting}
        if len(kinds) > 1:  # two of one name and skeleton are one, as merged files have them
            raise DataError(
                f"{file}: {len(fitting)} categories list their keypoints ({listed(names)}). Choose one with "
                f"{wanted.flag} NAME, or join those of the skeleton with {wanted.flag} {ALL}."
            )
    if not fitting:
        raise DataError(
            f"{file}: field 'categories' has no category that lists its keypoints. Give "
            f"person_keypoints_*.json (instances_*.json has none), or add the list of keypoint names."
        )
    strange = [c for c in fitting if not _is_id(whole(c.get("id")))]
    if strange:
        raise DataError(
            f"{file}: the id of category {strange[0].get('name')!r} is {strange[0].get('id')!r}, no integer. "
            f"Write ids as whole numbers, in annotations and images too."
        )
    first = fitting[0]
    if skeleton is not None and not _is_of(first, skeleton.keypoints):
        theirs, ours = [str(name) for name in first["keypoints"]], list(skeleton.keypoints)
        raise DataError(
            f"{file}: categories[{first.get('name')!r}].keypoints is not skeleton {skeleton.name!r}: "
            f"{name_difference(theirs, ours)}. Every number would go to the wrong joint: {wanted.way_out}."
        )
    return first, {whole(c["id"]) for c in fitting}


def _with_keypoints(categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that name their keypoints."""
    return [c for c in categories if isinstance(c.get("keypoints"), list) and c["keypoints"]]


def _is_of(category: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether its keypoints have these names in this order; one that names none may be of any."""
    theirs = category.get("keypoints") or names
    return [_plain(str(name)) for name in theirs] == [_plain(str(name)) for name in names]


def _people(categories: list[dict[str, Any]], names: bool) -> list[dict[str, Any]]:
    """The categories that people are of: those named person, else those with keypoints, else all. names:
    only such as name their keypoints."""
    with_keypoints = _with_keypoints(categories)
    candidates = with_keypoints if names else categories
    people = [c for c in candidates if _plain(str(c.get("name"))) == "person"]
    return people or with_keypoints or candidates


def _plain(name: str) -> str:
    """ "Left Eye", "left-eye" and "left_eye" are one name."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _images(file: str, data: AnnotationFile, repaired: Counter[str]) -> dict[int, ImageEntry]:
    """Entries by id, with sizes that are whole numbers where they are numbers."""
    _make_whole(data.images, repaired, "width", "height")
    return dict(zip(_ids(file, "images", data.images, repaired), data.images, strict=True))


def _make_whole(rows: Sequence[ImageEntry | Annotation], repaired: Counter[str], *names: str) -> None:
    """Whole numbers for floats in some fields; a row that had any is counted once."""
    for row in rows:
        floats = [name for name in names if type(getattr(row, name)) is float]
        for name in floats:
            setattr(row, name, whole(getattr(row, name)))
        repaired["whole_numbers"] += bool(floats)


def _is_id(value: Any) -> bool:
    """Ids are stored as int64."""
    return type(value) is int and -(2**63) <= value < 2**63


def _ids(
    file: str, section: str, rows: Sequence[ImageEntry | Annotation], repaired: Counter[str]
) -> list[int]:
    """Unique integer ids, or DataError: COCO's own index silently keeps the last of two."""
    _make_whole(rows, repaired, "id")
    ids = [row.id for row in rows]
    for index, identity in enumerate(ids):
        if not _is_id(identity):
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


def _annotations(
    file: str, data: AnnotationFile, images: Mapping[int, ImageEntry], repaired: Counter[str]
) -> list[Annotation]:
    """All annotations in order of (image_id, id), none without its image or category."""
    annotations = data.annotations
    _ids(file, "annotations", annotations, repaired)
    _refuse_lost(file, annotations, "image_id", images, repaired)
    categories = {whole(c.get("id")) for c in data.categories}
    _refuse_lost(file, annotations, "category_id", categories, repaired)
    return sorted(annotations, key=attrgetter("image_id", "id"))


def _without_box_labels(rows: list[Annotation], repaired: Counter[str]) -> list[Annotation]:
    """Without plain boxes over somebody who has keypoints: tools such as CVAT keep a box and a skeleton of
    one person. pycocotools would take the box for another person, one without keypoints, and forgive
    whatever is predicted there."""
    plain = {a.image_id for a in rows if not a.keypoints and is_box(a.bbox)}
    if not plain:
        return rows
    labelled: dict[int, list[list[float]]] = {image_id: [] for image_id in plain}
    for row in rows:
        if row.image_id in plain and row.keypoints and is_box(row.bbox):
            labelled[row.image_id].append(row.bbox)
    kept = [
        a
        for a in rows
        if a.keypoints or not is_box(a.bbox) or _overlap(a.bbox, labelled[a.image_id]) < SAME_PERSON
    ]
    repaired["box_labels"] = len(rows) - len(kept)
    return kept


def _overlap(box: list[float], others: list[list[float]]) -> float:
    """The largest intersection over union of one box and others, xywh."""
    low, size = np.array(box)[:2], np.array(box)[2:]
    corners, sizes = np.array(others, np.float64).reshape(-1, 2, 2).transpose(1, 0, 2)
    shared = (np.minimum(low + size, corners + sizes) - np.maximum(low, corners)).clip(0).prod(axis=1)
    return float((shared / (size.prod() + sizes.prod(axis=1) - shared)).max(initial=0))


def _refuse_lost(
    file: str, annotations: Sequence[Annotation], key: str, known: Collection[Any], repaired: Counter[str]
) -> None:
    """DataError where annotations refer to an image or category that is not there."""
    of = attrgetter(key)
    _make_whole(annotations, repaired, key)
    strange = [a for a in annotations if type(of(a)) is not int]
    if strange:
        raise DataError(
            f"{file}: {len(strange)} annotations have no whole number as {key}: annotation {strange[0].id} "
            f"has {of(strange[0])!r:.60}. Write the id that an entry of 'images' or 'categories' has."
        )
    if lost := [a.id for a in annotations if of(a) not in known]:
        raise DataError(
            f"{file}: the {key} of {len(lost)} annotations is not defined in the file: annotation "
            f"ids {listed(lost)}. Remove them, or add what they refer to."
        )
