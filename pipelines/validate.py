"""Validate: what is wrong with a COCO folder, before any work is put into it.

    read_split (both) -> each picture with people is opened -> a table by kind, with the way out

Annotations are judged by coco.py and pictures by photos.py, for preprocess and here: what the table calls
left out is what rejected.parquet will list. Added is only what no stage would notice: people whose keypoints
lie outside their box, pictures that both splits have, bytes that are not those of a checksum list.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from pipelines.config import DataSettings
from pipelines.progress import ProgressLine
from pipelines.sources.photos import check_photo, left_out, open_photo
from pipelines.sources.records import People, Photo, Rejection, Split, refuse_rejected
from pipelines.sources.splits import read_split, split_names
from pipelines.storage import writing

WAY_OUT = {
    "missing_image": "copy the picture there, or mend file_name (upper and lower case count)",
    "path_outside_root": "put the picture into the split's folder and name it relative to that",
    "image_size_invalid": "write the picture's width and height into its entry of 'images'",
    "bbox_invalid": "write the box as four numbers x, y, width, height with a positive size",
    "bbox_degenerate": "the box has no pixel in the picture: mend it, or remove the annotation",
    "area_not_positive": "write the segment's area in px, or width x height of the box",
    "keypoints_length": "write x, y, v for every keypoint of the skeleton; 0, 0, 0 where none is labelled",
    "keypoints_invalid": "write finite numbers",
    "visibility_invalid": "v is 0 (not labelled), 1 (hidden) or 2 (seen)",
    "empty": "copy or download the picture again",
    "not_an_image": "often the web page of a failed download: download the picture again",
    "unsupported_format": "convert it to JPEG or PNG, and mend file_name",
    "too_large": "scale the picture and its annotations down, or raise --data.max-pixels",
    "truncated": "copy or download the picture again",
    "decode_failed": "copy or download the picture again, or save it anew as 8-bit JPEG or PNG",
    "unreadable": "check the rights of the file and the disk",
    "size_differs": "the picture was scaled or turned after it was annotated: bring back the original",
    "class_invalid": "write the number of the class as the first field of the line",
    "label_unreadable": "write the label file as text, a line a person",
    "label_shared": "two pictures of one name have one label file: rename one of them",
    "exif_rotated": "YOLO-pose labels are of the picture as displayed: turn the pixels, drop the EXIF tag",
    "no_label": "YOLO-pose pictures without a label file count as pictures without people",
    "empty_label": "YOLO-pose pictures with an empty label file are pictures without people",
    "crowd": "the published protocol trains on no crowds; they stay in the ground truth of evaluation",
    "no_keypoints": "the published protocol trains on no one without a labelled keypoint",
    "hidden_coordinates": "v = 0 with a place: the place is not used",
    "num_keypoints": "the field disagrees with the keypoints, which are counted instead",
    "other_category": "annotations of other categories are passed over",
    "area_from_box": "no annotation has an area: 0.53 x box instead; for training, an AP is not COCO's",
    "duplicates": "lines of YOLO-pose labels that stand twice are read once",
    "boxes_clipped": "boxes beyond the picture are cut at its border; if many: are they x, y, x2, y2?",
    "keypoints_outside_box": "more than half of the keypoints lie outside the box: in px, of this picture?",
    "in_both_splits": "the same bytes are in both splits: take the picture out of one of them",
    "checksum_differs": "the file is not the one that the list describes: copy or download it again",
}
"""Every kind that a table may have, with what to do."""

Verdict = Rejection | bytes
"""Of a picture: why it is left out, or its sha256."""


@dataclass(frozen=True)
class CheckedSplit:
    """One split after its pictures were opened."""

    split: Split
    rejected: tuple[Rejection, ...]
    """Of annotations and pictures, in order of (image_id, ann_id)."""
    suspicious: tuple[Rejection, ...]
    """Kept by preprocess, and probably wrong."""
    photos: int
    """Usable pictures with people."""
    people: int
    """Usable people."""
    sha256: Mapping[bytes, str]
    """file_name of each usable picture by its content."""


@dataclass(frozen=True)
class Validation:
    """What `validate` found."""

    splits: tuple[CheckedSplit, ...]
    fatal: tuple[str, ...]
    """Why training on the set would be wrong, a paragraph each."""

    @property
    def exit_code(self) -> int:
        return 2 if self.fatal else 0

    def table(self, examples: int = 3) -> str:
        """By split and kind: rows, people, what becomes of them, the first examples, the way out."""
        lines = [line for checked in self.splits for line in _split_lines(checked, examples)]
        if self.fatal:
            return "\n".join(
                [*lines, "Training on this set would be wrong:", *(f"- {t}" for t in self.fatal)]
            )
        lost = sum(r.people for c in self.splits for r in c.rejected if r.is_defect)
        rest = (
            f"{lost:,} people are left out and listed in rejected.parquet" if lost else "nothing is left out"
        )
        return "\n".join(
            [*lines, f"This set can be trained on: {rest}, beside what the protocol leaves out."]
        )

    def rows(self) -> list[dict[str, object]]:
        """Every finding: split, kind, file, image_id, ann_id, people, detail."""
        return [
            {
                "split": checked.split.name,
                "kind": r.reason,
                "file": r.file,
                "image_id": r.image_id,
                "ann_id": "" if r.ann_id is None else r.ann_id,
                "people": r.people,
                "detail": r.detail,
            }
            for checked in self.splits
            for r in (*checked.rejected, *checked.suspicious)
        ]


def validate(
    root: str | Path,
    data: DataSettings,
    *,
    decode: bool = True,
    checksums: str | Path | None = None,
    workers: int = 1,
) -> Validation:
    """Both splits of the COCO folder `root`, to the end, whatever is found in the first.

    decode=False judges pictures by header and end alone, several times faster: damage in between is not
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
        splits.append(_check_split(split, data, decode, known, workers))
    if known is not None and splits and not any(_paths(c.split) & known.keys() for c in splits):
        raise DataError(
            f"{checksums}: no line is of a picture of {root}. Paths are relative to that folder: in it, run "
            f"sha256sum {data.train_split}/* {data.val_split}/*."
        )
    if len(splits) == 2:
        splits[1] = _with_shared_pictures(*splits)
    fatal |= dict.fromkeys(text for checked in splits for text in _fatal(checked))
    if data.strict:
        try:
            refuse_rejected([r for checked in splits for r in checked.rejected])
        except DataError as error:
            fatal[str(error)] = None
    return Validation(tuple(splits), tuple(fatal))


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
        raise DataError(f"{file}: cannot be written ({error.strerror}). Give another --out.") from None


# ---------------------------------------------------------------------------------- one split


def _check_split(
    split: Split, data: DataSettings, decode: bool, known: Mapping[str, str] | None, workers: int
) -> CheckedSplit:
    photos = list(split.by_photo())  # preprocess opens no others

    def look(photo: Photo) -> Verdict:
        opened = open_photo(photo, data.max_pixels) if decode else check_photo(photo, data.max_pixels)
        if isinstance(opened, Rejection):
            return opened
        return opened[1] if isinstance(opened, tuple) else opened.sha256

    verdicts = list(
        _told(split.name, len(photos), _in_threads(look, [photo for photo, _ in photos], workers))
    )
    rejected, usable, suspicious = list(split.rejected), {}, []
    for (photo, rows), verdict in zip(photos, verdicts, strict=True):
        if isinstance(verdict, Rejection):
            rejected.append(replace(verdict, people=rows.stop - rows.start))
            continue
        usable[photo.image_id] = photo.file_name, verdict
        suspicious += _suspicions(split, photo, split.people[rows], verdict.hex(), known or {})
    return CheckedSplit(
        split=split,
        rejected=tuple(sorted(rejected, key=attrgetter("order"))),
        suspicious=tuple(suspicious),
        photos=len(usable),
        people=int(np.isin(split.people.image_id, list(usable)).sum()),
        sha256={content: name for name, content in usable.values()},
    )


def _in_threads(look: Callable[[Photo], Verdict], photos: Sequence[Photo], workers: int) -> Iterator[Verdict]:
    """In the photos' order. Reading, decoding and hashing all let other threads run."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(look, photos)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for 100,000 pictures


def _told(name: str, total: int, verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """The same verdicts, with a line now and then that says how far it is."""
    line = ProgressLine(f"validate {name}", total, "pictures")
    for verdict in verdicts:
        line.add()
        yield verdict


def _suspicions(
    split: Split, photo: Photo, people: People, sha256: str, known: Mapping[str, str]
) -> Iterator[Rejection]:
    listed = known.get(f"{split.name}/{photo.file_name}", sha256)
    if listed != sha256:
        detail = f"sha256 {sha256[:12]}... instead of {listed[:12]}..."
        yield left_out(photo, "checksum_differs", detail, len(people))
    outside, labelled = _outside_box(people)
    for row in np.flatnonzero(outside > labelled / 2).tolist():
        box = ", ".join(f"{v:.1f}" for v in people.bbox_xywh[row].tolist())
        detail = f"{outside[row]} of {labelled[row]} labelled keypoints, box [{box}]"
        ann_id = int(people.ann_id[row])
        yield Rejection("keypoints_outside_box", photo.file_name, photo.image_id, ann_id, detail)


def _outside_box(people: People) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(P,) labelled keypoints further than a tenth of the box outside of it; all labelled ones."""
    corner, size = people.bbox_xywh[:, None, :2], people.bbox_xywh[:, None, 2:]
    labelled = people.keypoints[..., 2] > 0
    outside = (np.abs(people.keypoints[..., :2] - corner - size / 2) > 0.6 * size).any(axis=2)
    return (outside & labelled).sum(axis=1), labelled.sum(axis=1)


# ---------------------------------------------------------------------------------- the set as a whole


def _with_shared_pictures(train: CheckedSplit, val: CheckedSplit) -> CheckedSplit:
    """`val` with a suspicion for each picture whose bytes the training split has too."""
    photos = {photo.file_name: (photo, rows) for photo, rows in val.split.by_photo()}
    shared = []
    for content, name in val.sha256.items():
        if content in train.sha256:
            photo, rows = photos[name]
            detail = f"the bytes of {train.split.name}/{train.sha256[content]}"
            shared.append(left_out(photo, "in_both_splits", detail, rows.stop - rows.start))
    return replace(val, suspicious=(*val.suspicious, *shared))


def _fatal(checked: CheckedSplit) -> Iterator[str]:
    """Why training on this split would be wrong. A few odd rows are no reason, most of them are."""
    name, file = checked.split.name, checked.split.annotation_file
    lost = sum(r.people for r in checked.rejected if r.is_defect)
    count = Counter(r.reason for r in checked.suspicious)
    if not checked.people:
        yield f"{file}: no person of {name} can be used. The table says why."
    elif lost > checked.people:
        yield (
            f"{file}: {lost:,} people of {name} are left out for defects and only {checked.people:,} are "
            f"kept. Pictures and annotations hardly belong together: mend what the table lists first."
        )
    if (outside := count["keypoints_outside_box"]) > checked.people / 2:
        yield (
            f"{file}: most keypoints of {outside:,} of {checked.people:,} people of {name} lie outside their "
            f"boxes. Keypoints and boxes are px of the stored picture, boxes x, y, width, height; relative "
            f"numbers from 0 to 1 must be multiplied first."
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


# ---------------------------------------------------------------------------------- checksums


def read_checksums(file: str | Path) -> dict[str, str]:
    """Path relative to the COCO root -> hex sha256, from lines as sha256sum writes them."""
    try:
        lines = Path(file).read_text().splitlines()
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


# ---------------------------------------------------------------------------------- the table


def _split_lines(checked: CheckedSplit, examples: int) -> Iterator[str]:
    split = checked.split
    pictures = len(split.photos) + sum(1 for r in split.rejected if r.ann_id is None)
    yield (
        f"{split.name}: {pictures:,} pictures in {split.annotation_file}; {checked.people:,} people on "
        f"{checked.photos:,} of them can be used"
    )
    groups: dict[tuple[int, str, str], list[Rejection]] = {}
    for rows, order, fate in (
        ([r for r in checked.rejected if r.is_defect], 0, "left out"),
        (checked.suspicious, 1, "kept, look at it"),
        ([r for r in checked.rejected if not r.is_defect], 2, "left out by the protocol"),
    ):
        for row in rows:
            groups.setdefault((order, row.reason, fate), []).append(row)
    if groups or split.repaired:
        yield f"  {'kind':<24}{'rows':>8}{'people':>8}  what becomes of it"
    for (order, reason, fate), rows in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        yield f"  {reason:<24}{len(rows):>8,}{sum(r.people for r in rows):>8,}  {fate}: {WAY_OUT[reason]}"
        shown = 0 if order == 2 else examples
        for row in rows[:shown]:
            who = "" if row.ann_id is None else f", annotation {row.ann_id}"
            yield f"      {row.file}{who}: {row.detail}"
        if 0 < shown < len(rows):
            yield f"      and {len(rows) - shown:,} more"
    for kind, number in sorted(split.repaired.items()):
        yield f"  {kind:<24}{number:>8,}{'':>8}  repaired: {WAY_OUT[kind]}"
    unusable = sum(1 for r in checked.rejected if r.is_defect and r.ann_id is None)
    if unusable:
        yield f"  hrnet evaluate refuses {split.name} while pictures cannot be used ({unusable:,})"
    yield ""
