"""What the scores of keypoints were in the evaluation of a checkpoint: what drift is measured from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hrnet_core.errors import PoseError
from hrnet_core.score_drift import SCORE_BOUNDS
from pipelines.storage.files import join, read_json
from pipelines.tracking.checkpoints import LocalCheckpoint, evaluation_folder

BOXES = ("gt", "det")


def expected_scores(found: LocalCheckpoint, sha256: str, flip_test: bool, storage: str) -> tuple[int, ...]:
    """Counts of keypoint scores, by bucket, in an evaluation of these weights; () where none is known.

    Of a registered version: of what evaluate has recorded with it. Of others: of the evaluation.json that it
    leaves unless it is told where to. Only of the flip test that is served: it lowers scores. Of several the
    one of ground-truth boxes, then of more keypoints.
    """
    known = list(found.evaluations) or _beside(found.name, sha256, storage)
    usable = [one for one in known if _usable(one, flip_test)]
    best = max(usable, key=_rank, default=None)
    return tuple(best["keypoint_scores"]["counts"]) if best else ()


def _rank(evaluation: dict[str, Any]) -> tuple[bool, int]:
    """Many of a detector's boxes hold nobody, whom no client would ask about."""
    return evaluation["protocol"]["boxes"] == "gt", sum(evaluation["keypoint_scores"]["counts"])


def _usable(evaluation: dict[str, Any], flip_test: bool) -> bool:
    scores = evaluation.get("keypoint_scores") or {}
    same_buckets = scores.get("up_to") == list(SCORE_BOUNDS)
    return same_buckets and any(scores["counts"]) and evaluation["protocol"]["flip_test"] == flip_test


def _beside(checkpoint: str, sha256: str, storage: str) -> list[dict[str, Any]]:
    return [one for one in _read(checkpoint, storage) if one.get("weights_sha256") == sha256]


def _read(checkpoint: str, storage: str) -> Iterable[dict[str, Any]]:
    for boxes in BOXES:
        try:
            file = join(evaluation_folder(checkpoint, boxes, storage), "evaluation.json")
            written = read_json(file) or {}
        except (PoseError, OSError, ValueError):  # an endpoint comes up without it
            continue
        yield {**written, "keypoint_scores": written.get("figures", {}).get("keypoint_scores")}
