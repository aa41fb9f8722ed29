"""What validate found: every kind with its way out, findings by split, the table that is printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from hrnet_core.errors import shown
from pipelines.sources.doubts import Doubt
from pipelines.sources.examine import Look
from pipelines.sources.records import Rejection, Split

WAY_OUT = {
    "missing_image": "copy the picture there, or mend file_name (its folder, upper and lower case count)",
    "path_outside_root": "put the picture into the split's folder and name it relative to that",
    "image_size_invalid": "write its width and height in px into its entry of 'images', or leave both out",
    "bbox_invalid": "write the box as four numbers x, y, width, height with a positive size",
    "bbox_degenerate": "the box has no pixel in the picture: mend it, or remove the annotation",
    "keypoints_length": "write x, y, v for every keypoint of the skeleton; 0, 0, 0 where none is labelled",
    "keypoints_invalid": "write finite numbers; in YOLO-pose labels fractions from 0 to 1, not px",
    "visibility_invalid": "v is 0 (not labelled), 1 (hidden) or 2 (seen)",
    "empty": "copy or download the picture again",
    "not_an_image": "often the web page of a failed download: download the picture again",
    "unsupported_format": "convert it to JPEG or PNG, and mend file_name",
    "too_large": "scale the picture and its annotations down, or raise --data.max-pixels",
    "truncated": "copy or download the picture again",
    "decode_failed": "copy or download the picture again, or save it anew as 8-bit JPEG or PNG",
    "unreadable": "check the rights of the file and the disk",
    "size_differs": "the picture was scaled or turned after it was annotated: bring back what was annotated",
    "class_invalid": "write the number of the class first in the line, and spaces between its fields",
    "label_unreadable": "write the label file as text, a line a person",
    "label_shared": "two pictures of one name have one label file: rename one of them",
    "exif_rotated": "YOLO-pose labels are of the picture as displayed: turn the pixels, drop the EXIF tag",
    "no_label": "YOLO-pose pictures without a label file count as pictures without people",
    "empty_label": "YOLO-pose pictures with an empty label file are pictures without people",
    "crowd": "the published protocol trains on no crowds; they stay in the ground truth of evaluation",
    "no_keypoints": "the published protocol trains on no one without a labelled keypoint",
    "hidden_coordinates": "v = 0 with a place: the place is not used",
    "nested_keypoints": "a list of [x, y, v] is read as the flat list of COCO",
    "null_coordinates": "null or NaN where v = 0: read as not labelled",
    "whole_numbers": "ids and sizes such as 7.0 are read as 7",
    "sizes_read": "no width and height in the entry of 'images': read from the picture",
    "byte_order_mark": "the file starts with a byte order mark, which is no JSON: it was taken off",
    "box_labels": "a box alone over somebody with keypoints is the same person: passed over",
    "file_names": "backslashes, folders in front, composed or decomposed characters: the picture was found",
    "num_keypoints": "the field disagrees with the keypoints, which are counted instead",
    "other_category": "annotations of other categories are passed over",
    "area_from_box": "no area above 0: 0.53 x width x height of the box; AP is near COCO's, not it",
    "two_dimensions": "keypoints of two numbers: labelled unless at (0, 0) or below 0",
    "identity_flip_idx": "flip_idx exchanges nothing, so it says nothing: the skeleton's pairs are used",
    "fractions_clipped": "fractions a hair outside 0 to 1 are taken as 0 or 1",
    "duplicates": "lines of YOLO-pose labels that stand twice are read once",
    "boxes_clipped": "boxes beyond the picture are cut at its border; if many: are they x, y, x2, y2?",
    "keypoints_outside_box": "more than half of the keypoints lie outside the box: in px, of this picture?",
    "box_is_corners": "boxes are x, y, width, height, not x, y, x2, y2",
    "coordinates_scaled": "write px of the stored picture, not fractions, percent or px of another size",
    "keypoints_outside_picture": "write px of the stored picture, or v = 0 where nothing can be seen",
    "visible_at_origin": "write v = 0 for a keypoint that is not labelled",
    "same_person_twice": "remove the copies: AP counts all but one as missed",
    "left_right_exchanged": "exchange left and right of the pairs, or the order of the names",
    "same_box": "write each person's own box",
    "area_impossible": "write the area of the outline in px, or leave area out",
    "area_is_box": "AP on width x height is too high; take the areas out, then 0.53 of it is used",
    "same_picture_twice": "remove the copy: its people weigh twice",
    "exif_turned": "are labels of the stored pixels? If not, turn the pixels; then drop the EXIF tag",
    "same_file": "entries of 'images' that lead to one file: name the picture of each",
    "in_both_splits": "the same bytes are in both splits: take the picture out of one of them",
    "checksum_differs": "the file is not the one that the list describes: copy or download it again",
}
"""Every kind that a table may have, with what to do."""


KIND = 26
"""Characters of the table's first column."""
FATES = ("left out", "kept, look at it", "left out by the protocol")


@dataclass(frozen=True)
class Finding:
    """One kind of a split."""

    kind: str
    fate: str
    """What preprocess does with the rows: one of FATES."""
    rows: tuple[Rejection, ...]
    evidence: str
    """Of a doubt: what is seen, in figures, and what it does."""

    @property
    def people(self) -> int:
        return sum(row.people for row in self.rows)

    @property
    def matters(self) -> bool:
        return self.fate != FATES[2]


@dataclass(frozen=True)
class CheckedSplit:
    """One split after its pictures were looked at."""

    split: Split
    rejected: tuple[Rejection, ...]
    """Of annotations and pictures, in order of (image_id, ann_id)."""
    suspicious: tuple[Rejection, ...]
    """Kept by preprocess, and probably wrong."""
    doubts: tuple[Doubt, ...]
    """What `suspicious` has of annotations, with the evidence of all."""
    looks: tuple[Look, ...]
    """Usable pictures with people."""
    people: int
    """Usable people."""

    @property
    def photos(self) -> int:
        return len(self.looks)

    def findings(self) -> list[Finding]:
        """What the table lists: defects first, then what is kept, then the protocol's; of each the most
        frequent first."""
        evidence = {doubt.kind: doubt.evidence for doubt in self.doubts}
        groups: dict[tuple[int, str], list[Rejection]] = {}
        for row in self.rejected:
            groups.setdefault((0 if row.is_defect else 2, row.reason), []).append(row)
        for row in self.suspicious:
            groups.setdefault((1, row.reason), []).append(row)
        ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1])))
        return [
            Finding(kind, FATES[order], tuple(rows), evidence.get(kind, ""))
            for (order, kind), rows in ordered
        ]


@dataclass(frozen=True)
class Validation:
    """What `validate` found."""

    splits: tuple[CheckedSplit, ...]
    fatal: tuple[str, ...]
    """Why training or an AP on the set would be wrong, a paragraph each."""
    scored: str = ""
    """The split that an AP is asked on; "" where evaluate takes none."""

    @property
    def exit_code(self) -> int:
        return 2 if self.fatal else 0

    def table(self, examples: int = 3) -> str:
        """By split and kind: rows, people, what becomes of them, the first examples, the way out."""
        lines = [line for checked in self.splits for line in _split_lines(checked, examples)]
        if self.fatal:
            return "\n".join(
                [*lines, "This set is not good as it is:", *(f"- {shown(t)}" for t in self.fatal)]
            )
        return "\n".join([*lines, *self.good])

    @property
    def good(self) -> list[str]:
        """Of a set where nothing is fatal: that it is good, and what it costs all the same."""
        lost = sum(r.people for c in self.splits for r in c.rejected if r.is_defect)
        rest = (
            f"{lost:,} people are left out and listed in rejected.parquet" if lost else "nothing is left out"
        )
        lines = [f"This set is good: {rest}, beside what the protocol leaves out."]
        unasked = [c for c in self.splits if c.split.name == self.scored for r in c.rejected if r.is_defect]
        if unasked:
            lines.append(
                f"Evaluate counts {len(unasked):,} of them, of {self.scored}, as missed whatever a network "
                f"does, unless boxes of a detector find them: mend them first."
            )
        return lines

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


def wrapped(table: str, width: int) -> str:
    """The table for a terminal of so many columns: what does not fit goes on below where it began."""
    lines = []
    for line in table.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        of_kind = indent == 2 and line[2 : 2 + KIND].strip() in WAY_OUT
        hang = KIND + 20 if of_kind else indent + 2  # what becomes of it stands behind two columns of 8
        one = textwrap.TextWrapper(
            width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False
        )
        lines += one.wrap(line) or [""]
    return "\n".join(lines)


def _split_lines(checked: CheckedSplit, examples: int) -> Iterator[str]:
    split = checked.split
    entries = {photo.image_id for photo in split.photos}
    entries |= {r.image_id for r in split.rejected if r.ann_id is None}
    yield (
        f"{split.name}: {len(entries):,} pictures in {split.annotation_file}; {checked.people:,} people on "
        f"{checked.photos:,} of them can be used"
    )
    groups = checked.findings()
    if groups or split.repaired:
        yield f"  {'kind':<{KIND}}{'rows':>8}{'people':>8}  what becomes of it"
    for found in groups:
        count = f"{len(found.rows):>8,}{found.people:>8,}"
        yield f"  {found.kind:<{KIND}}{count}  {found.fate}: {WAY_OUT[found.kind]}"
        if found.evidence:
            yield f"      {found.evidence}"
        listed = examples if found.matters else 0
        for row in found.rows[:listed]:
            who = "" if row.ann_id is None else f", annotation {row.ann_id}"
            yield f"      {shown(row.file)}{who}: {shown(row.detail)}"
        if 0 < listed < len(found.rows):
            yield f"      and {len(found.rows) - listed:,} more"
    for kind, number in sorted(split.repaired.items()):
        yield f"  {kind:<{KIND}}{number:>8,}{'':>8}  repaired: {WAY_OUT[kind]}"
    if unread := sum(1 for look in checked.looks if look.sha256 is None):
        yield f"  {unread:,} of {checked.photos:,} pictures were judged by their header alone (--read 0: all)"
    yield ""
