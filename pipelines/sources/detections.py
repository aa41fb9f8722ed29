"""A detector's COCO results: the boxes that evaluate asks about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hrnet_core.errors import DataError
from pipelines.sources.coco import load
from pipelines.sources.records import CocoSplit, Person, Rejection
from pipelines.sources.rows import is_number, listed


def read_detections(file: str | Path, split: CocoSplit, score_threshold: float = 0.0) -> CocoSplit:
    """`split` with the people of a detector: a JSON list of {image_id, category_id, bbox xywh, score}.

    Kept are entries of the split's category with score >= score_threshold, boxes as given (never
    sanitised), keypoints and visible zero; ann_id is the index in the file (official coco.py:246-287).
    Entries whose box is no box are rejected. DataError where the file is of another kind, names images
    that the split does not have, or leaves no box.
    """
    file = Path(file)
    rows, _ = load(file)
    _check_detections(file, rows)
    num_keypoints = next((len(p.visible) for photo in split.photos for p in photo.people), 0)
    photos = {photo.image_id: photo for photo in split.photos}
    gone = {r.image_id for r in split.rejected if r.ann_id is None}
    unknown = sorted({r["image_id"] for r in rows} - photos.keys() - gone)
    if unknown:
        raise DataError(
            f"{file}: {len(unknown)} image ids are not in {split.annotation_file}: {listed(unknown)}. These "
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
        if len(box) != 4 or not all(map(is_number, box)) or not (box[2] > 0 and box[3] > 0):
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
        if not is_number(row["score"]):
            raise DataError(
                f"{file}: entry {index}, field 'score' is {row['score']!r}; a finite number is needed."
            )
