"""Validate: what is wrong with a COCO folder, before any work is put into it.

    read_split (both) -> doubts -> each picture with people is looked at -> findings by kind, with the way out

Annotations are judged by rows.py and pictures by photos.py, for preprocess and here: what the table calls
left out is what rejected.parquet will list. Added is only what no stage would notice: people whose keypoints
lie outside their box, pictures that both splits have, bytes that are not those of a checksum list.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from hrnet_core.errors import DataError
from hrnet_core.locations import one_line
from hrnet_core.skeleton import load_skeleton
from pipelines.process.progress import ProgressLine
from pipelines.settings.config import DataSettings
from pipelines.sources.doubts import Doubt, doubts_of, outside_box, seen_of
from pipelines.sources.examine import Look, equal_files, examine
from pipelines.sources.findings import CheckedSplit, Validation
from pipelines.sources.photos import left_out
from pipelines.sources.records import People, Photo, Rejection, Split, refuse_rejected
from pipelines.sources.splits import read_split, split_names
from pipelines.storage.files import read_file, writing


def validate(
    root: str | Path,
    data: DataSettings,
    *,
    decode: bool = True,
    most: int = 0,
    checksums: str | Path | None = None,
    workers: int = 1,
) -> Validation:
    """Both splits of the COCO folder `root`, to the end, whatever is found in the first.

    most: pictures of a split that are read to their end, spread evenly (0: all); of the others the header is
    judged. decode=False judges those by header and end alone, several times faster: damage in between is not
    seen. checksums: a file as sha256sum writes it, with paths relative to the root. With data.strict
    whatever is left out is fatal, as it is for preprocess. Prints progress. DataError for the list itself.
    """
    known = read_checksums(checksums) if checksums else None
    splits: list[CheckedSplit] = []
    fatal: dict[str, None] = {}
    for name in split_names(data):
        try:
            split = read_split(root, name, data)
        except DataError as error:
            fatal[str(error)] = None  # once, where both splits have it
            continue
        splits.append(
            _check_split(split, data, known, decode=decode, most=0 if known else most, workers=workers)
        )
    if known is not None and splits and not any(_paths(c.split) & known.keys() for c in splits):
        raise DataError(
            f"{checksums}: no line is of a picture of {root}. Paths are relative to that folder: in it, run "
            f"sha256sum {data.train_split}/* {data.val_split}/*."
        )
    if len(splits) == 2:
        splits[1] = _with_shared_pictures(*splits)
    fatal |= dict.fromkeys(text for checked in splits for text in _fatal(checked))
    scored = data.val_split if data.format == "coco" else ""  # the only one that evaluate takes
    for checked in splits:
        if checked.split.name == scored:
            fatal |= dict.fromkeys(_unscorable(checked))
    if data.strict:
        try:
            refuse_rejected([r for checked in splits for r in checked.rejected])
        except DataError as error:
            fatal[str(error)] = None
    return Validation(tuple(splits), tuple(fatal), scored)


def write_csv(found: Validation, file: str | Path) -> None:
    """Every finding as a line. DataError where the file cannot be written."""
    rows = found.rows()
    names = ["split", "kind", "file", "image_id", "ann_id", "people", "detail"]
    try:
        with writing(file) as part, part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({error.strerror or one_line(error)}). Give another --out."
        ) from None


# ---------------------------------------------------------------------------------- one split


def _check_split(
    split: Split, data: DataSettings, known: Mapping[str, str] | None, **depth: Any
) -> CheckedSplit:
    rejected, looks = list(split.rejected), []
    counts = {photo.image_id: rows.stop - rows.start for photo, rows in split.by_photo()}
    line = ProgressLine(f"validate {split.name}", len(counts), "pictures")
    for found in examine(split, data.max_pixels, **depth):
        line.add()
        if isinstance(found, Rejection):
            rejected.append(replace(found, people=counts[found.image_id]))
        else:
            looks.append(found)
    doubts = doubts_of(seen_of(split), load_skeleton(data.skeleton), data.coordinates_checked)
    suspicious = [r for look in looks for r in _of_picture(split, look, known or {})]
    suspicious += [r for look in looks for r in _of_people(split, look, doubts)]
    for one, other in equal_files(looks, looks):
        if one.photo.image_id > other.photo.image_id:
            detail = f"the bytes of {other.photo.file_name}"
            suspicious.append(left_out(one.photo, "same_picture_twice", detail, counts[one.photo.image_id]))
    return CheckedSplit(
        split=split,
        rejected=tuple(sorted(rejected, key=attrgetter("order"))),
        suspicious=tuple(suspicious),
        doubts=tuple(doubts),
        looks=tuple(looks),
        people=sum(counts[look.photo.image_id] for look in looks),
    )


def _of_picture(split: Split, look: Look, known: Mapping[str, str]) -> Iterator[Rejection]:
    """What is odd about a file."""
    photo, people = look.photo, look.people.stop - look.people.start
    if look.sha256 is not None:
        sha256 = look.sha256.hex()
        listed = known.get(f"{split.name}/{photo.file_name}", sha256)
        if listed != sha256:
            detail = f"sha256 {sha256[:12]}... instead of {listed[:12]}..."
            yield left_out(photo, "checksum_differs", detail, people)
    if look.orientation != 1:
        detail = f"EXIF orientation {look.orientation}; stored {photo.width} x {photo.height} px"
        yield left_out(photo, "exif_turned", detail, people)


def _of_people(split: Split, look: Look, doubts: Sequence[Doubt]) -> Iterator[Rejection]:
    """What is odd about the people of a picture."""
    for doubt in doubts:
        for row in (look.people.start + np.flatnonzero(doubt.who[look.people])).tolist():
            yield _odd(look.photo, split.people[row : row + 1], doubt.kind)


def _odd(photo: Photo, person: People, kind: str) -> Rejection:
    """person: a table of one."""
    box = ", ".join(f"{v:g}" for v in person.stated_xywh[0].round(1).tolist())
    detail = f"area {person.area[0]:g}, picture {photo.width} x {photo.height} px"
    if kind == "keypoints_outside_box":
        (outside,), (labelled,) = outside_box(person)
        detail = f"{outside} of {labelled} labelled keypoints"
    return Rejection(kind, photo.file_name, photo.image_id, int(person.ann_id[0]), f"{detail}, box [{box}]")


# ---------------------------------------------------------------------------------- the set as a whole


def _with_shared_pictures(train: CheckedSplit, val: CheckedSplit) -> CheckedSplit:
    """`val` with a suspicion for each picture whose bytes the training split has too."""
    shared = [
        left_out(
            mine.photo,
            "in_both_splits",
            f"the bytes of {train.split.name}/{theirs.photo.file_name}",
            mine.people.stop - mine.people.start,
        )
        for mine, theirs in equal_files(val.looks, train.looks)
    ]
    return replace(val, suspicious=(*val.suspicious, *shared))


def _fatal(checked: CheckedSplit) -> Iterator[str]:
    """Why training on this split would be wrong. A few odd rows are no reason, most of them are."""
    name, file = checked.split.name, checked.split.annotation_file
    lost = sum(r.people for r in checked.rejected if r.is_defect)
    count = Counter(r.reason for r in checked.suspicious)
    if not checked.people:
        defects = [r for r in checked.rejected if r.is_defect]
        first = next((f"{r.file}, {r.reason}, {r.detail}" for r in (*defects, *checked.rejected)), "")
        told = f" The first: {first.rstrip('.')}." if first else ""
        yield f"{file}: no person of {name} can be used.{told}"
    elif lost > checked.people:
        yield (
            f"{file}: {lost:,} people of {name} are left out for defects and only {checked.people:,} are "
            f"kept. Pictures and annotations hardly belong together: mend what the table lists first."
        )
    for doubt in checked.doubts:
        if doubt.proven:
            yield f"{file}: {doubt.evidence}"
    if (turned := count["exif_turned"]) > checked.photos / 2:
        yield (
            f"{file}: EXIF turns {turned:,} of {checked.photos:,} pictures of {name}. Crops are cut from the "
            f"stored pixels, as COCO's loaders do: labels made on the displayed picture then lie elsewhere "
            f"(--page draws some). If they do, turn the pixels themselves; in any case drop the EXIF tag."
        )
    if (shared := count["in_both_splits"]) > checked.photos / 2:
        yield (
            f"{file}: {shared:,} of {checked.photos:,} pictures of {name} are in the training split too. Its "
            f"AP would say nothing about pictures that the network has not seen: split the set anew."
        )
    if differing := count["checksum_differs"]:
        yield (
            f"{name}: {differing:,} pictures are not those of the checksum list. They decode, so nothing "
            f"else would notice: copy them again."
        )


def _unscorable(checked: CheckedSplit) -> Iterator[str]:
    """Why evaluate refuses the split."""
    try:
        checked.split.truth.refuse_unscorable()
    except DataError as error:
        yield str(error)
    if without := [r for r in checked.rejected if r.is_defect and r.ann_id is None]:
        yield (
            f"{checked.split.annotation_file}: {len(without):,} pictures of {checked.split.name} cannot be "
            f"used, the first is {without[0].file} ({without[0].reason}). Training could go on without them, "
            f"evaluation is refused: its AP would be comparable with none. Mend them, or take them and their "
            f"annotations out."
        )


# ---------------------------------------------------------------------------------- checksums


def read_checksums(file: str | Path) -> dict[str, str]:
    """Path relative to the COCO root -> hex sha256, from lines as sha256sum writes them."""
    try:
        lines = read_file(str(file)).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: the checksum list cannot be read ({error}).") from None
    known = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise DataError(
                f"{file}: line {number} is {line[:80]!r}; a line is a sha256 of 64 digits, two spaces and a "
                f"path relative to the COCO folder, as sha256sum writes it."
            )
        known[match[2]] = match[1].lower()
    return known


def _paths(split: Split) -> set[str]:
    return {f"{split.name}/{photo.file_name}" for photo in split.photos}
