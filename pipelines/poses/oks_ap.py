"""COCO keypoint results and ground truth -> the ten figures, equal to pycocotools' to the last digit."""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.files import json_kind
from hrnet_core.skeleton import COCO17, Skeleton
from pipelines.sources.annotations import TO_SCORE, Annotations, read_annotations
from pipelines.sources.doubts import doubts_of, refuse_misread
from pipelines.sources.json_file import load
from pipelines.sources.records import BOX_AREA, GroundTruth, counted
from pipelines.sources.rows import is_number, listed, whole

logger = logging.getLogger(__name__)
STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
"""The ten figures of COCO's keypoint task, in pycocotools' order."""
JOINED = 1
"""The category that everyone has in scoring."""
MAX_DETS = 20
"""Best results of an image that count (COCO keypoints)."""


def evaluate_results(
    results: str | Path | list[dict[str, Any]],
    ground_truth: Annotations | GroundTruth,
    *,
    skeleton: Skeleton = COCO17,
    use_area: bool = True,
    category: str | None = None,
    coordinates_checked: bool = False,
) -> dict[str, float]:
    """The figures of a COCO keypoint results list, equal to pycocotools' to the last digit.

    results, ground_truth: JSON files (or .json.gz), or what they hold; neither is changed. Scored is
    everyone whom the reader of annotations accepts, under ids of our own: pycocotools takes id 0 for nobody
    and averages over categories, where those that were joined (category "all") are one here. The order of
    the results is kept, because equal scores are ranked by it.
    The OKS constants are the skeleton's. use_area=False replaces the annotations' area by 0.53 x box width x
    height, as data sets without segments are scored (CrowdPose, AI Challenger).

    Returns STATS by name, -1 where the ground truth has no such person; and AP_easy, AP_medium, AP_hard
    (rounded to 4 digits, as published) where every image has CrowdPose's `crowdIndex`.
    DataError: a file that is not COCO's, an unknown image, a wrong number of keypoints, NaN.
    """
    truth = ground_truth
    if not isinstance(truth, GroundTruth):
        read = read_annotations(truth, skeleton, TO_SCORE._replace(category=category))
        doubts = doubts_of(read.seen, skeleton, coordinates_checked)
        refuse_misread(read.name, doubts)
        for doubt in doubts:
            logger.info("%s: %s", read.name, doubt.evidence)
        if read.judged.repaired:
            logger.info("%s: repaired: %s", read.name, counted(read.judged.repaired))
        truth = read.truth
    truth = _scorable(truth, use_area)
    people = truth.people
    if not (~people.crowd & (people.keypoints[..., 2] > 0).any(axis=1)).any():
        raise DataError(
            f"{truth.name}: nobody in it has labelled keypoints and is no crowd, so there is no AP."
        )
    name, found = "the results", results
    if isinstance(results, str | Path):
        name, (found, _) = str(results), load(results)
    found = _checked_results(found, name, truth, skeleton)
    stats, _ = _pycocotools(truth, found, skeleton, truth.image_ids)
    if truth.crowd_index is not None:
        stats |= _by_crowding(truth, truth.crowd_index, found, skeleton)
    return stats


def _scorable(truth: GroundTruth, use_area: bool) -> GroundTruth:
    """The ground truth with its areas decided; DataError where somebody cannot be scored against."""
    truth.refuse_unscorable()
    people = truth.people
    if not use_area:
        areas = BOX_AREA * people.stated_xywh[:, 2:].prod(axis=1)
        return replace(truth, people=replace(people, area=areas))
    without = np.isnan(people.area) & ~people.crowd & (people.keypoints[..., 2] > 0).any(axis=1)
    if without.any() or not truth.has_areas:
        who = f"annotation {people.ann_id[without][0]}" if without.any() else "every annotation"
        raise DataError(
            f"{truth.name}: {who} has no area, which OKS is measured by. Write the area of the outline in "
            f"px, or score by {BOX_AREA} x width x height of the boxes with --no-use-area."
        )
    return replace(truth, people=replace(people, area=np.nan_to_num(people.area)))


def _pycocotools(
    truth: GroundTruth, found: list[dict[str, Any]], skeleton: Skeleton, image_ids: NDArray[np.int64]
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """STATS over some images, and precision (thresholds, recalls, categories, areas, max_dets)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools writes into the records it is given, and prints.
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth, coco_found = COCO(), COCO()
        coco_truth.dataset = coco_dataset(truth)
        coco_truth.createIndex()
        if found:
            coco_found = coco_truth.loadRes([dict(r) for r in found])
        evaluator = COCOeval(coco_truth, coco_found, "keypoints")
        evaluator.params.kpt_oks_sigmas = np.array(skeleton.oks_sigmas)
        evaluator.params.imgIds = sorted(image_ids.tolist())
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = dict(zip(STATS, evaluator.stats.tolist(), strict=True))
    return stats, evaluator.eval["precision"]


def coco_dataset(truth: GroundTruth) -> dict[str, Any]:
    """The ground truth as COCO's own fields: ids from 1 in order, keypoints counted."""
    people = truth.people
    columns = {
        "id": range(1, len(people) + 1),
        "image_id": people.image_id.tolist(),
        "iscrowd": people.crowd.astype(int).tolist(),
        "keypoints": people.keypoints.reshape(len(people), -1).tolist(),
        "num_keypoints": (people.keypoints[..., 2] > 0).sum(axis=1).tolist(),
        "area": people.area.tolist(),
        "bbox": people.stated_xywh.tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    annotations = [dict(zip(columns, row, strict=True), category_id=JOINED) for row in rows]
    return {
        "images": [{"id": image_id} for image_id in truth.image_ids.tolist()],
        "annotations": annotations,
        "categories": [{"id": JOINED, "name": "person"}],
    }


def _by_crowding(
    truth: GroundTruth, crowding: NDArray[np.float64], found: list[dict[str, Any]], skeleton: Skeleton
) -> dict[str, float]:
    """CrowdPose's AP over images with crowdIndex below 0.2, below 0.8 and above (its published evaluator)."""
    bounds = {"AP_easy": (-np.inf, 0.2), "AP_medium": (0.2, 0.8), "AP_hard": (0.8, np.inf)}
    figures = {}
    for name, (low, high) in bounds.items():
        ids = truth.image_ids[(low <= crowding) & (crowding < high)]
        _, precision = _pycocotools(truth, found, skeleton, ids)
        figures[name] = round(float(np.mean(precision[:, :, :, 0, :])), 4) if len(ids) else -1.0
    return figures


def _checked_results(found: Any, name: str, truth: GroundTruth, skeleton: Skeleton) -> list[dict[str, Any]]:
    """The results as they are, after all that pycocotools would trip over or pass by in silence."""
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise DataError(
            f"{name}: COCO results are a list of objects with image_id, category_id, keypoints and score, "
            f"got {json_kind(found)}."
        )
    images = set(truth.image_ids.tolist())
    numbers = 3 * skeleton.num_keypoints
    boxed = bool(found) and bool(found[0].get("bbox"))

    def problem(result: dict[str, Any]) -> str | None:
        missing = [k for k in ("image_id", "category_id", "keypoints", "score") if k not in result]
        if missing:
            return f"has no {', '.join(missing)}"
        image_id, category_id, points = result["image_id"], result["category_id"], result["keypoints"]
        if type(whole(image_id)) is not int or image_id not in images:
            return f"is of image {image_id!r:.60}, which {truth.name} does not have"
        if type(whole(category_id)) is not int or category_id not in truth.category_ids:
            people = listed(sorted(truth.category_ids))
            return (
                f"is of category {category_id!r:.60}; people are {people} in {truth.name} (predict: "
                f"--predict.category-id)"
            )
        if not isinstance(points, list) or len(points) != numbers:
            got = f"{len(points)} numbers" if isinstance(points, list) else type(points).__name__
            return (
                f"has {got} in keypoints; {skeleton.num_keypoints} keypoints of skeleton {skeleton.name!r} "
                f"are {numbers} numbers x, y, score (another skeleton: --skeleton)"
            )
        if bool(result.get("bbox")) != boxed:
            return "has a bbox and others have none (or the other way round)"
        fields = {"keypoints": points, "score": [result["score"]], "bbox": result["bbox"] if boxed else []}
        if boxed and not (isinstance(fields["bbox"], list) and len(fields["bbox"]) == 4):
            return f"has {fields['bbox']!r:.60} as bbox, not four numbers"
        for key, values in fields.items():
            if strange := [repr(value) for value in values if not is_number(value)]:
                return f"has {strange[0]:.60} in {key}, which is not a finite number"
        return None

    for index, result in enumerate(found):
        if why := problem(result):
            raise DataError(f"{name}: result {index} (counted from 0) {why}.")
    return [r | {"image_id": whole(r["image_id"]), "category_id": JOINED} for r in found]
