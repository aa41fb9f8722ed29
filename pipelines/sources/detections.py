"""A detector's COCO results: the boxes that evaluate asks about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hrnet_core.errors import DataError
from hrnet_core.files import json_kind
from pipelines.settings.config import BoxesCategory
from pipelines.sources.boxes import box_and_score, is_of, named, refuse_other_category
from pipelines.sources.json_file import load
from pipelines.sources.records import People, Rejection, Split
from pipelines.sources.rows import is_box, is_number, listed, not_a_box, whole


def read_detections(
    file: str | Path, split: Split, score_threshold: float = 0.0, category: BoxesCategory | None = None
) -> tuple[People, list[Rejection]]:
    """The people of a detector: a JSON list of {image_id, category_id, bbox xywh, score}; and why others of
    its entries are out.

    category: that people have in the file, or ALL; None: the annotations', one of them or more. Kept are
    entries of it with score >= score_threshold, boxes as given (never sanitised), keypoints zero; ann_id is
    the index in the file (official coco.py:246-287). Entries whose box is no box are rejected. DataError
    where the file is of another kind, names images that the split does not have, or leaves no box.
    """
    file = str(file)
    rows, _ = load(file)
    _check_detections(file, rows)
    known = split.truth.category_ids
    wanted = known if category is None else category
    refuse_other_category(file, rows, wanted, "--evaluate.boxes-category")
    names = {photo.image_id: photo.file_name for photo in split.photos}
    gone = {r.image_id for r in split.rejected if r.ann_id is None}
    unknown = sorted({whole(r["image_id"]) for r in rows} - names.keys() - gone)
    if unknown:
        raise DataError(
            f"{file}: {len(unknown)} image ids are not in {split.annotation_file}: {listed(unknown)}. These "
            f"detections are of other pictures: give the file made for split {split.name!r}."
        )
    kept, rejected = [], list[Rejection]()
    for index, row in enumerate(rows):
        image_id, (box, score) = whole(row["image_id"]), box_and_score(row)
        if not is_of(row["category_id"], wanted) or score < score_threshold or image_id in gone:
            continue
        if is_box(box):
            kept.append((image_id, index, box, score))
        else:
            detail = f"bbox {box!r:.80} of entry {index} {not_a_box(box)}"
            rejected.append(Rejection("bbox_invalid", names[image_id], image_id, index, detail))
    if not kept and rejected:
        raise DataError(f"{file}: none of {len(rows)} boxes can be used. The first: {rejected[0].detail}.")
    if not kept:
        raise DataError(
            f"{file}: no box is left of {len(rows)} entries (category {named(wanted)}, score at least "
            f"{score_threshold:g}). Lower --evaluate.score-threshold, or give a file with person detections."
        )
    image_ids, indices, boxes, scores = zip(*sorted(kept), strict=True)
    stated = np.array(boxes, np.float64)
    categories = [whole(rows[index]["category_id"]) for index in indices]
    people = People(
        image_id=np.array(image_ids, np.int64),
        ann_id=np.array(indices, np.int64),
        # A detector's own number for people is none of the annotations', which the results must have.
        category_id=np.array([c if c in known else min(known) for c in categories], np.int64),
        keypoints=np.zeros((len(kept), *split.people.keypoints.shape[1:])),
        bbox_xywh=stated.astype(np.float32),
        stated_xywh=stated,
        area=stated[:, 2] * stated[:, 3],
        score=np.array(scores, np.float64),
        crowd=np.zeros(len(kept), bool),
    )
    return people, rejected


def _check_detections(file: str, rows: Any) -> None:
    """DataError unless `rows` is a list of detection entries; boxes are looked at one by one later."""
    entry = '{"image_id", "category_id", "bbox": [x, y, w, h], "score": a finite number}'
    wanted = f"a detection file is a JSON list of {entry}"
    if not isinstance(rows, list):
        hint = ": an annotation file" if isinstance(rows, dict) and "annotations" in rows else ""
        raise DataError(f"{file}: {wanted}, this is {json_kind(rows)}{hint}.")
    if not rows:
        raise DataError(f"{file}: no entries; {wanted}. Run the detector again, or evaluate without --boxes.")
    kinds = {"image_id": (int,), "category_id": (int,), "bbox": (list,), "score": (int, float)}
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file}: entry {index} is {json_kind(row)}; {wanted}.")
        for key, types in kinds.items():
            scored = key == "score" and key not in row and len(row["bbox"]) == 5  # bbox was looked at before
            value = whole(row["bbox"][4] if scored else row.get(key))
            if type(value) not in types or (key == "score" and not is_number(value)):
                hint = " (these are keypoint results?)" if key == "bbox" and "keypoints" in row else ""
                raise DataError(f"{file}: entry {index}, field {key!r} is {value!r}{hint}; {wanted}.")
