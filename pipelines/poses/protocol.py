"""From answers to COCO results and figures: rescoring, OKS-NMS, and all that decides them."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrnet_core.errors import DataError
from hrnet_core.geometry import box_to_center_scale
from hrnet_core.oks import oks, oks_nms, rescore, soft_oks_nms
from hrnet_core.skeleton import Skeleton
from pipelines.config import EvaluateSettings
from pipelines.poses.oks_ap import MAX_DETS, STATS
from pipelines.sources.evaluation_set import People

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec


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


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found out; the same stands in `folder`/evaluation.json."""

    stats: dict[str, float]
    """STATS by name; -1 where the ground truth has no such person."""
    metric: str
    """ "eval_gt" (ground-truth boxes) or "eval_det" (a detector's)."""
    protocol: dict[str, Any]
    """What decides the figures. Two evaluations compare where data_digest, boxes, flip_test and preset
    are equal."""
    figures: dict[str, Any]
    """people, photos, results, seconds, people_per_second (0 where all was there), median_oks, and
    left_out: annotations or boxes not predicted, by reason."""
    folder: Path
    version: str | None = None
    """The registered model that the figures were recorded with, "hrnet-pose/3"."""

    @property
    def results_file(self) -> Path:
        return self.folder / "results.json"

    def table(self) -> str:
        """The ten figures under their names, the protocol above them and the work below."""
        return "\n".join(
            [
                protocol_line(self.protocol),
                "  ".join(f"{name:>6}" for name in STATS),
                "  ".join(f"{self.stats[name]:6.3f}" for name in STATS),
                work_line(self.figures),
            ]
        )


def protocol_line(protocol: dict[str, Any]) -> str:
    """One line that says what the figures are of."""
    p = protocol
    boxes = "ground-truth boxes" if p["boxes"] == "gt" else f"detector boxes {p['boxes_file']}"
    flip = "flip test" if p["flip_test"] else "no flip test"
    width, height = p["input_size"]
    nms = "soft OKS-NMS" if p["soft_nms"] else "OKS-NMS"
    return (
        f"{p['split']}, {boxes}, {flip}, {nms} {p['oks_nms']:g}, preset {p['preset']}; "
        f"{height}x{width} {p['codec']['name']}, {p['mode']}"
    )


def work_line(figures: dict[str, Any]) -> str:
    f = figures
    speed = f", {f['people_per_second']:.1f} people/s" if f["people_per_second"] else ""
    return (
        f"{f['people']} people in {f['photos']} photographs, {f['results']} results after OKS-NMS"
        f"{speed}; median OKS of a labelled person {f['median_oks']:.3f}"
    )


@dataclass(frozen=True)
class Matched:
    """One labelled person and the prediction that fits best."""

    path: str
    image_id: int
    ann_id: int
    bbox_xywh: NDArray[np.float32]
    """(4,), the ground truth's, image px."""
    truth: NDArray[np.float32]
    """(K, 2) image px."""
    visible: NDArray[np.float32]
    """(K,) 0, 1, 2."""
    predicted: NDArray[np.float32]
    """(K, 2) image px; NaN where nothing was predicted in this image."""
    scores: NDArray[np.float32]
    """(K,)"""
    oks: float
    """0 where nothing was predicted."""
    similarity: NDArray[np.float64]
    """(K,): each keypoint's term of OKS; NaN where it is not labelled."""


def answer_dtype(num_keypoints: int) -> np.dtype[Any]:
    """One answered box: photo px and scores as the predictor gave them."""
    return np.dtype(
        [
            ("image_id", "<i8"),
            ("id", "<i8"),
            ("keypoints", "<f4", (num_keypoints, 2)),
            ("scores", "<f4", (num_keypoints,)),
        ]
    )


def to_results(
    answers: NDArray[Any], people: People, spec: CheckpointSpec, settings: EvaluateSettings
) -> list[dict[str, Any]]:
    """COCO results of sorted answers: rescored, OKS-NMS within each image, sorted by (image_id, id).

    Score: mean of the keypoint scores above the threshold, times the box's (1 for ground truth), float64.
    NMS counts a person's area as that of the padded, aspect-fixed box (official coco.py:326-357).
    """
    asked = [person for photo in people.photos for person in photo.people]
    scores = rescore(answers["scores"], [p.score for p in asked], settings.keypoint_threshold)
    _, scale = box_to_center_scale([p.bbox_xywh for p in asked], spec.input_size, spec.padding)
    areas = scale.astype(np.float64).prod(axis=-1)
    suppress = soft_oks_nms if settings.soft_nms else oks_nms
    kept = []
    for rows in _by_image(answers["image_id"]):
        inside = suppress(
            answers["keypoints"][rows], scores[rows], areas[rows], spec.skeleton.oks_sigmas, settings.oks_nms
        )
        kept.append(rows.start + np.sort(inside))
    keep = np.concatenate(kept)
    return poses_to_results(
        answers["image_id"][keep],
        answers["id"][keep],
        answers["keypoints"][keep],
        answers["scores"][keep],
        scores[keep],
        people.split.category_id,
    )


def match_people(answers: NDArray[Any], people: People, skeleton: Skeleton) -> list[Matched]:
    """Each labelled person with its prediction: for ground-truth boxes its own, else the best by OKS."""
    where = {int(answers["image_id"][rows.start]): rows for rows in _by_image(answers["image_id"])}
    sigmas = np.array(skeleton.oks_sigmas)
    matched = []
    for photo in people.labelled.photos:
        here = answers[where.get(photo.image_id, slice(0, 0))]
        for person in photo.people:
            mine = here[here["id"] == person.ann_id] if people.boxes is None else here
            fits = oks(person.keypoints, mine["keypoints"], person.area, sigmas, person.visible)
            best = int(fits.argmax()) if len(mine) else None
            predicted = mine["keypoints"][best] if len(mine) else np.full(person.keypoints.shape, np.nan)
            squared = ((predicted - person.keypoints) ** 2).sum(axis=-1)
            similarity = np.nan_to_num(np.exp(-squared / (8 * sigmas**2 * person.area)))
            matched.append(
                Matched(
                    path=photo.path,
                    image_id=photo.image_id,
                    ann_id=person.ann_id,
                    bbox_xywh=person.bbox_xywh,
                    truth=person.keypoints,
                    visible=person.visible,
                    predicted=predicted,
                    scores=mine["scores"][best] if len(mine) else np.zeros(len(sigmas), np.float32),
                    oks=float(fits[best]) if len(mine) else 0.0,
                    similarity=np.where(person.visible > 0, similarity, np.nan),
                )
            )
    return matched


def _by_image(image_ids: NDArray[np.int64]) -> list[slice]:
    """Slices of equal neighbours."""
    edges = np.flatnonzero(np.diff(image_ids)) + 1
    return [slice(int(a), int(b)) for a, b in itertools.pairwise([0, *edges, len(image_ids)])]


def protocol_of(
    people: People, spec: CheckpointSpec, settings: EvaluateSettings, mode: str
) -> dict[str, Any]:
    """All that decides the figures. data_digest covers the annotation file and the boxes file."""
    name, sha256 = people.boxes or (None, None)
    content = f"{people.split.annotation_sha256} {sha256 or 'ground-truth'}"
    return {
        "data_digest": hashlib.sha256(content.encode()).hexdigest(),
        "boxes": "gt" if people.boxes is None else f"det {name} {sha256}",
        "boxes_file": name,
        "flip_test": settings.flip_test,
        "preset": _preset(settings),
        "split": people.split.name,
        "annotation_sha256": people.split.annotation_sha256,
        "boxes_sha256": sha256,
        "score_threshold": settings.score_threshold if people.boxes else None,
        "keypoint_threshold": settings.keypoint_threshold,
        "oks_nms": settings.oks_nms,
        "soft_nms": settings.soft_nms,
        "max_dets": MAX_DETS,
        "batch_size": settings.batch_size,
        "input_size": list(spec.input_size),
        "codec": spec.codec.as_dict(),
        "padding": spec.padding,
        "weights": spec.weights,
        "weights_sha256": spec.weights_sha256,
        "mode": mode,
        "skeleton": spec.skeleton.name,
        "oks_sigmas": list(spec.skeleton.oks_sigmas),
        "evaluator": f"pycocotools {version('pycocotools')}",
    }


def _preset(settings: EvaluateSettings) -> str:
    """The preset's name, with whatever departs from it: figures of different rules must not be compared."""
    plain = EvaluateSettings()
    rules = ("score_threshold", "keypoint_threshold", "oks_nms", "soft_nms")
    changed = [f"{r} {getattr(settings, r)}" for r in rules if getattr(settings, r) != getattr(plain, r)]
    return " ".join([settings.preset, *changed])
