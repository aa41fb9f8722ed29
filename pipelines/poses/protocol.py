"""From answers to COCO results and figures: rescoring, OKS-NMS, and all that decides them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrnet_core.errors import DataError
from hrnet_core.geometry import box_to_center_scale
from hrnet_core.oks import oks, oks_nms, rescore, soft_oks_nms
from hrnet_core.skeleton import Skeleton
from pipelines.poses.oks_ap import MAX_DETS, STATS, evaluate_results
from pipelines.settings.config import EvaluateSettings
from pipelines.sources.evaluation_set import EvaluationSet
from pipelines.sources.records import LEFT_OUT_AS_PUBLISHED, GroundTruth, People, counted
from pipelines.storage.files import join

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec


def poses_to_results(
    image_ids: ArrayLike,
    instance_ids: ArrayLike,
    keypoints: ArrayLike,
    keypoint_scores: ArrayLike,
    scores: ArrayLike,
    category_ids: ArrayLike = 1,
) -> list[dict[str, Any]]:
    """COCO keypoint results, sorted by (image_id, instance id): AP depends on the order of equal scores.

    image_ids, instance_ids int (P,); keypoints (P, K, 2) in photo px; keypoint_scores (P, K); scores (P,),
    the person's; category_ids int (P,), or one of all. Numbers become float64. DataError where one is not
    finite.
    """
    order = np.lexsort((np.asarray(instance_ids, np.int64), np.asarray(image_ids, np.int64)))
    image_ids, totals = np.asarray(image_ids, np.int64)[order], np.asarray(scores, np.float64)[order]
    parts = [np.asarray(keypoints, np.float64), np.asarray(keypoint_scores, np.float64)[..., None]]
    triples = np.concatenate(parts, axis=-1)[order].reshape(len(order), -1)
    strange = ~(np.isfinite(triples).all(axis=1) & np.isfinite(totals))
    if strange.any():
        raise DataError(
            f"results: {strange.sum()} poses have coordinates or scores that are not finite, the first in "
            f"image {image_ids[strange][0]}. The model that made them has diverged, or its checkpoint is "
            f"damaged."
        )
    categories = np.broadcast_to(category_ids, len(order))[order]
    columns = image_ids, categories, triples, totals
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [{"image_id": i, "category_id": c, "keypoints": k, "score": s} for i, c, k, s in rows]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found out; the same stands in `folder`/evaluation.json."""

    stats: dict[str, float]
    """STATS by name; -1 where the ground truth has no such person."""
    protocol: dict[str, Any]
    """What decides the figures. Two evaluations compare where data_digest, boxes, flip_test and preset
    are equal."""
    figures: dict[str, Any]
    """people, photos, results, seconds, people_per_second (0 where all was there), median_oks;
    keypoint_scores: {"up_to", "counts"} of all that was asked about; left_out: annotations or boxes not
    predicted, by reason; repaired, doubts: people of the annotations by kind (docs/bad-data.md)."""
    folder: str
    """Path or URI."""
    version: str | None = None
    """The registered model that the figures were recorded with, "hrnet-pose/3"."""

    @property
    def metric(self) -> str:
        """ "eval_gt" (ground-truth boxes) or "eval_det" (a detector's)."""
        return "eval_gt" if self.protocol["boxes"] == "gt" else "eval_det"

    @property
    def results_file(self) -> str:
        return join(self.folder, "results.json")

    def table(self) -> str:
        """The ten figures under their names, the protocol above them and the work below."""
        names = "  ".join(f"{name:>6}" for name in STATS)
        values = "  ".join(f"{self.stats[name]:6.3f}" for name in STATS)
        return "\n".join([protocol_line(self.protocol), names, values, work_line(self.figures)])


def protocol_line(protocol: dict[str, Any]) -> str:
    """One line that says what the figures are of."""
    p, (width, height) = protocol, protocol["input_size"]
    boxes = "ground-truth boxes" if p["boxes"] == "gt" else f"detector boxes {p['boxes_file']}"
    flip = "flip test" if p["flip_test"] else "no flip test"
    nms = "soft OKS-NMS" if p["soft_nms"] else "OKS-NMS"
    return (
        f"{p['split']}, {boxes}, {flip}, {nms} {p['oks_nms']:g}, preset {p['preset']}; "
        f"{height}x{width} {p['codec']['name']}, {p['mode']}"
    )


def work_line(figures: dict[str, Any]) -> str:
    f = figures
    speed = f", {f['people_per_second']:.1f} people/s" if f["people_per_second"] else ""
    lost = {reason: n for reason, n in f["left_out"].items() if reason not in LEFT_OUT_AS_PUBLISHED}
    notes = [
        f"; {said}: {counted(kinds)}"
        for said, kinds in (
            ("repaired", f["repaired"]),
            ("hrnet validate shows what looks wrong", f["doubts"]),
            ("not asked about, counted as missed", lost),
        )
        if kinds
    ]
    return (
        f"{f['people']} people in {f['photos']} photographs, {f['results']} results after OKS-NMS"
        f"{speed}; median OKS of a labelled person {f['median_oks']:.3f}{''.join(notes)}"
    )


def score_poses(
    keypoints: NDArray[np.float32],
    scores: NDArray[np.float32],
    asked: People,
    truth: GroundTruth,
    spec: CheckpointSpec,
    settings: EvaluateSettings,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The ten figures of the poses of `asked`, and the COCO results that they are of: rescored, with OKS-NMS
    within each image, in order.

    keypoints (P, K, 2) in photo px and scores (P, K) of each asked person in turn. This is the one protocol:
    evaluate, the AP of an epoch, export and measured modes all come here. A person's score: mean of the
    keypoint scores above the threshold, times the box's (1 for ground truth), float64. NMS counts a person's
    area as that of the padded, aspect-fixed box (official coco.py:326-357).
    """
    totals = rescore(scores, asked.score, settings.keypoint_threshold)
    _, scale = box_to_center_scale(asked.bbox_xywh, spec.input_size, spec.padding)
    areas = scale.astype(np.float64).prod(axis=-1)
    suppress = soft_oks_nms if settings.soft_nms else oks_nms
    sigmas, kept = spec.skeleton.oks_sigmas, [np.zeros(0, np.int64)]
    for rows in asked.by_image().values():
        inside = suppress(keypoints[rows], totals[rows], areas[rows], sigmas, settings.oks_nms)
        kept.append(rows.start + np.sort(inside))
    keep = np.concatenate(kept)
    found = asked.image_id[keep], asked.ann_id[keep], keypoints[keep], scores[keep], totals[keep]
    results = poses_to_results(*found, asked.category_id[keep])
    # A data set without areas (CrowdPose) is scored by its boxes.
    return evaluate_results(results, truth, skeleton=spec.skeleton, use_area=truth.has_areas), results


@dataclass(frozen=True, eq=False)
class Matched:
    """N labelled people, each with the prediction that fits best."""

    people: People
    predicted: NDArray[np.float32]
    """(N, K, 2) photo px; NaN where nothing was predicted in this image."""
    scores: NDArray[np.float32]
    """(N, K)"""
    oks: NDArray[np.float64]
    """(N,); 0 where nothing was predicted."""
    similarity: NDArray[np.float64]
    """(N, K) each keypoint's term of OKS; NaN where it is not labelled."""


def match_people(
    keypoints: NDArray[np.float32], scores: NDArray[np.float32], of: EvaluationSet, skeleton: Skeleton
) -> Matched:
    """Each labelled person with its prediction: for ground-truth boxes its own, else the best by OKS."""
    people, sigmas = of.split.people, np.array(skeleton.oks_sigmas)
    places, areas, labelled = people.keypoints[..., :2], people.area, people.keypoints[..., 2] > 0
    best = np.arange(len(people))
    if of.boxes is not None:
        best, answered = np.full(len(people), -1), of.asked.by_image()
        for image_id, rows in people.by_image().items():
            if (there := answered.get(image_id)) is not None:
                each = (places[rows, None], keypoints[there], areas[rows, None], sigmas, labelled[rows, None])
                best[rows] = there.start + oks(*each).argmax(axis=1)
    found = best >= 0
    predicted = np.where(found[:, None, None], keypoints[best], np.nan)
    squared = ((predicted - places) ** 2).sum(axis=-1)
    similarity = np.nan_to_num(np.exp(-squared / (8 * sigmas**2 * areas[:, None])))
    return Matched(
        people=people,
        predicted=predicted,
        scores=np.where(found[:, None], scores[best], 0),
        oks=np.where(found, oks(places, predicted, areas, sigmas, labelled), 0),
        similarity=np.where(labelled, similarity, np.nan),
    )


def protocol_of(
    of: EvaluationSet, spec: CheckpointSpec, settings: EvaluateSettings, mode: str
) -> dict[str, Any]:
    """All that decides the figures. data_digest covers the annotation file and the boxes file."""
    name, sha256 = of.boxes or (None, None)
    content = f"{of.split.annotation_sha256} {sha256 or 'ground-truth'}"
    return {
        "data_digest": hashlib.sha256(content.encode()).hexdigest(),
        "boxes": "gt" if of.boxes is None else f"det {name} {sha256}",
        "boxes_file": name,
        "flip_test": settings.flip_test,
        "preset": _preset(settings),
        "split": of.split.name,
        "annotation_sha256": of.split.annotation_sha256,
        "boxes_sha256": sha256,
        "score_threshold": settings.score_threshold if of.boxes else None,
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
    rules = ("category", "boxes_category", "score_threshold", "keypoint_threshold", "oks_nms", "soft_nms")
    changed = [f"{r} {getattr(settings, r)}" for r in rules if getattr(settings, r) != getattr(plain, r)]
    return " ".join([settings.preset, *changed])
