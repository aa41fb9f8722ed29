"""COCO keypoint results and ground truth -> the ten figures, equal to pycocotools' to the last digit."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.skeleton import COCO17, Skeleton
from pipelines.storage import read_json

STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
"""The ten figures of COCO's keypoint task, in pycocotools' order."""
MAX_DETS = 20
"""Best results of an image that count (COCO keypoints)."""
BOX_AREA = 0.53
"""Area of a person in areas of its box, where annotations have none (CrowdPose, AI Challenger)."""


def evaluate_results(
    results: str | Path | list[dict[str, Any]],
    ground_truth: str | Path | dict[str, Any],
    *,
    skeleton: Skeleton = COCO17,
    use_area: bool = True,
) -> dict[str, float]:
    """The figures of a COCO keypoint results list, equal to pycocotools' to the last digit.

    results, ground_truth: JSON files (or .json.gz), or what they hold; neither is changed. The order of
    the results is kept, because equal scores are ranked by it. The OKS constants are the skeleton's.
    use_area=False replaces the annotations' area by 0.53 x box width x height, as data sets without
    segments are scored (CrowdPose, AI Challenger).

    Returns STATS by name, -1 where the ground truth has no such person; and AP_easy, AP_medium, AP_hard
    (rounded to 4 digits, as published) where every image has CrowdPose's `crowdIndex`.
    DataError: a file that is not COCO's, an unknown image, a wrong number of keypoints, NaN.
    """
    truth_name, truth = read_json(ground_truth, "the ground truth")
    name, found = read_json(results, "the results")
    truth = _checked_truth(truth, truth_name, skeleton, use_area)
    found = _checked_results(found, name, truth, truth_name, skeleton)
    stats, _ = _pycocotools(truth, found, skeleton, [image["id"] for image in truth["images"]])
    if truth["images"] and all("crowdIndex" in image for image in truth["images"]):
        stats |= _by_crowding(truth, found, skeleton)
    return stats


def _pycocotools(
    truth: dict[str, Any], found: list[dict[str, Any]], skeleton: Skeleton, image_ids: list[int]
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """STATS over some images, and precision (thresholds, recalls, categories, areas, max_dets)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools writes into the records it is given, and prints.
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth, coco_found = COCO(), COCO()
        coco_truth.dataset = {**truth, "annotations": [dict(a) for a in truth["annotations"]]}
        coco_truth.createIndex()
        if found:
            coco_found = coco_truth.loadRes([dict(r) for r in found])
        evaluator = COCOeval(coco_truth, coco_found, "keypoints")
        evaluator.params.kpt_oks_sigmas = np.array(skeleton.oks_sigmas)
        evaluator.params.imgIds = sorted(image_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = dict(zip(STATS, evaluator.stats.tolist(), strict=True))
    return stats, evaluator.eval["precision"]


def _by_crowding(truth: dict[str, Any], found: list[dict[str, Any]], skeleton: Skeleton) -> dict[str, float]:
    """CrowdPose's AP over images with crowdIndex below 0.2, below 0.8 and above (its published evaluator)."""
    bounds = {"AP_easy": (-np.inf, 0.2), "AP_medium": (0.2, 0.8), "AP_hard": (0.8, np.inf)}
    figures = {}
    for name, (low, high) in bounds.items():
        ids = {image["id"] for image in truth["images"] if low <= image["crowdIndex"] < high}
        some = [r for r in found if r["image_id"] in ids]
        _, precision = _pycocotools(truth, some, skeleton, list(ids))
        figures[name] = round(float(np.mean(precision[:, :, :, 0, :])), 4) if ids else -1.0
    return figures


def _checked_truth(truth: Any, name: str, skeleton: Skeleton, use_area: bool) -> dict[str, Any]:
    """The ground truth with its areas decided, after every field that pycocotools reads was seen."""
    if not isinstance(truth, dict) or not all(
        isinstance(truth.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(
            f"{name}: COCO ground truth is an object with the lists images, annotations and categories."
        )
    needed = ["id", "image_id", "category_id", "bbox", "iscrowd", "num_keypoints", "keypoints"]
    needed += ["area"] if use_area else []
    for annotation in truth["annotations"]:
        missing = [key for key in needed if key not in annotation]
        if missing:
            way = " Without areas, score with --no-use-area." if missing == ["area"] else ""
            raise DataError(
                f"{name}: annotation {annotation.get('id')!r} has no {', '.join(missing)}; "
                f"COCO keypoint annotations have {', '.join(needed)}.{way}"
            )
        count = len(annotation["keypoints"])
        if count != 3 * skeleton.num_keypoints:
            raise DataError(
                f"{name}: annotation {annotation['id']} has {count / 3:g} keypoints, the skeleton "
                f"{skeleton.name!r} has {skeleton.num_keypoints} and as many OKS constants. Name the "
                f"skeleton of this data (--skeleton FILE.json, docs/skeletons.md)."
            )
    if use_area:
        return truth
    boxed = [{**a, "area": BOX_AREA * (a["bbox"][3] * a["bbox"][2])} for a in truth["annotations"]]
    return {**truth, "annotations": boxed}


def _checked_results(
    found: Any, name: str, truth: dict[str, Any], truth_name: str, skeleton: Skeleton
) -> list[dict[str, Any]]:
    """The results as they are, after all that pycocotools would trip over or pass by in silence."""
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise DataError(
            f"{name}: COCO results are a list of objects with image_id, category_id, keypoints and score, "
            f"got {type(found).__name__}."
        )
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    numbers = 3 * skeleton.num_keypoints
    boxed = bool(found) and bool(found[0].get("bbox"))

    def refuse(index: int, why: str) -> DataError:
        return DataError(f"{name}: result {index} (counted from 0) {why}.")

    for index, result in enumerate(found):
        missing = [k for k in ("image_id", "category_id", "keypoints", "score") if k not in result]
        if missing:
            raise refuse(index, f"has no {', '.join(missing)}")
        if result["image_id"] not in images:
            raise refuse(index, f"is of image {result['image_id']!r}, which {truth_name} does not have")
        if result["category_id"] not in categories:
            raise refuse(
                index,
                f"is of category {result['category_id']!r}; {truth_name} has {sorted(categories)}",
            )
        points = result["keypoints"]
        if not isinstance(points, list) or len(points) != numbers:
            got = f"{len(points)} numbers" if isinstance(points, list) else type(points).__name__
            raise refuse(
                index,
                f"has {got} in keypoints; {skeleton.num_keypoints} keypoints of skeleton "
                f"{skeleton.name!r} are {numbers} numbers x, y, score (another skeleton: --skeleton)",
            )
        if bool(result.get("bbox")) != boxed:
            raise refuse(index, "has a bbox and others have none (or the other way round)")
        values = [*points, result["score"], *(result["bbox"] if boxed else ())]
        if not all(isinstance(v, int | float) for v in values) or not np.isfinite(values).all():
            raise refuse(index, "has a keypoint, score or bbox entry that is not a finite number")
    return found
