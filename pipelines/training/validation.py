"""The AP of each epoch: val shards through the predictor, scored with ground-truth boxes (val_gt/AP).

Not quite `hrnet evaluate`: crops come from the shards (JPEG q95 instead of the photo), and the ground
truth is rebuilt from their rows, which have no crowds and nobody without keypoints. With ground-truth
boxes a crowd can only turn a wrong pose from counted to ignored, so the figures differ in the third digit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hrnet_core.geometry import apply_affine, place_in_image
from hrnet_core.oks import oks
from pipelines.config import EvaluateSettings
from pipelines.poses.protocol import score_poses
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_rows, read_row_group
from pipelines.shards.schema import CROP_COLUMNS
from pipelines.sources.records import GroundTruth, People

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.predictor import PosePredictor


SHOWN = 12
"""People of the overlays: spread over the split, the same each time."""
TRUTH = ("image_id", "ann_id", "keypoints", "area", "bbox_xywh")


@dataclass(frozen=True)
class Answers:
    """Predictions of P people of the val split."""

    ann_ids: NDArray[np.int64]
    """(P,)"""
    keypoints: NDArray[np.float32]
    """(P, K, 2) photo px."""
    scores: NDArray[np.float32]
    """(P, K)"""
    loss: float
    """Sum over people of the official loss of the (flip-averaged) heatmaps against the stored ones."""

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        """All workers' answers in order of ann_id."""
        ann_ids = np.concatenate([p.ann_ids for p in parts])
        order = np.argsort(ann_ids)
        keypoints = np.concatenate([p.keypoints for p in parts])[order]
        scores = np.concatenate([p.scores for p in parts])[order]
        return cls(ann_ids[order], keypoints, scores, sum(p.loss for p in parts))


class Validation:
    """The val split as worker `rank` of `world` sees it: every world-th row group is its own."""

    def __init__(self, manifest: Manifest, split: str, rank: int = 0, world: int = 1) -> None:
        self.manifest, self.split = manifest, split
        self.skeleton = manifest.recipe.skeleton
        shards = manifest.shards(split)
        self.groups = [(s, g) for s, shard in enumerate(shards) for g in range(len(shard.row_groups))]
        self.own = self.groups[rank::world]

    def answer(self, predictor: PosePredictor, flip_test: bool, batch_size: int) -> Answers:
        """Predictions for this worker's people."""
        import torch

        from hrnet_core.loss import joints_mse

        columns = (*CROP_COLUMNS, "heatmaps", "weights", "ann_id")
        parts = [self._empty()]
        for shard, group in self.own:
            table = read_row_group(self.manifest, self.split, shard, group, columns)
            rows = decode_rows(table, self.manifest)
            heatmaps = predictor.heatmaps(rows["images"], flip_test, batch_size)
            keypoints, scores = self.manifest.recipe.codec.decode(heatmaps)
            tensors = [torch.from_numpy(np.array(a)) for a in (heatmaps, rows["heatmaps"], rows["weights"])]
            loss = float(joints_mse(*tensors)) * len(heatmaps)
            placed = place_in_image(keypoints, rows["image_to_crop"])
            parts.append(Answers(rows["ann_id"], placed, scores, loss))
        return Answers.join(parts)

    def _empty(self) -> Answers:
        k = self.skeleton.num_keypoints
        return Answers(
            np.zeros(0, np.int64), np.zeros((0, k, 2), np.float32), np.zeros((0, k), np.float32), 0.0
        )

    @cached_property
    def truth(self) -> GroundTruth:
        """All people of the split as the shards have them."""
        tables = [read_row_group(self.manifest, self.split, s, g, TRUTH) for s, g in self.groups]
        rows = decode_rows(pa.concat_tables(tables), self.manifest)
        order = np.lexsort((rows["ann_id"], rows["image_id"]))
        people = People(
            image_id=rows["image_id"],
            ann_id=rows["ann_id"],
            keypoints=rows["keypoints"].astype(np.float64),
            bbox_xywh=rows["bbox_xywh"],
            stated_xywh=rows["bbox_xywh"].astype(np.float64),
            area=rows["area"].astype(np.float64),
            score=np.ones(len(order)),
            crowd=np.zeros(len(order), bool),
        )[order]
        return GroundTruth(self.manifest.folder, np.unique(people.image_id), people)

    def score(
        self, answers: Answers, spec: CheckpointSpec, settings: EvaluateSettings
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The ten figures of COCO, and the results they are of. Everyone must have been answered once."""
        people = self.truth.people
        if not np.array_equal(answers.ann_ids, np.sort(people.ann_id)):
            raise RuntimeError(
                f"{len(answers.ann_ids)} answers ({len(np.unique(answers.ann_ids))} different) for "
                f"{len(people)} people of {self.split}"
            )
        rows = np.searchsorted(answers.ann_ids, people.ann_id)
        return score_poses(answers.keypoints[rows], answers.scores[rows], people, self.truth, spec, settings)

    def overlay(self, answers: Answers) -> NDArray[np.uint8]:
        """A sheet of SHOWN people: the truth beside the prediction, OKS underneath; uint8 (H, W, 3)."""
        import cv2

        from hrnet_core.overlays import draw_poses, tile

        pairs, labels = [], []
        for row in self._shown():
            index = int(np.searchsorted(answers.ann_ids, row["ann_id"]))
            predicted, truth = answers.keypoints[index], row["keypoints"]
            zoom = max(1, round(256 / row["images"].shape[0]))
            crop = cv2.resize(row["images"], None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
            matrix = row["image_to_crop"] * zoom
            matrix[:, 2] += (zoom - 1) / 2  # pixel centres
            both = [
                draw_poses(crop, apply_affine(matrix, xy)[None], scores[None], self.skeleton, threshold)
                for xy, scores, threshold in (
                    (truth[:, :2], (truth[:, 2] > 0).astype(np.float32), 0.5),
                    (predicted, answers.scores[index], 0.2),
                )
            ]
            pairs.append(np.concatenate(both, axis=1))
            fit = oks(truth[:, :2], predicted, row["area"], self.skeleton.oks_sigmas, truth[:, 2])
            labels.append(f"{row['ann_id']}: OKS {float(fit):.2f}")
        return tile(pairs, columns=4, labels=labels)

    def _shown(self) -> list[dict[str, Any]]:
        """Rows of the people in the overlays."""
        starts = np.cumsum([0, *(r for s in self.manifest.shards(self.split) for r in s.row_groups)])
        places = np.linspace(0, starts[-1] - 1, min(SHOWN, int(starts[-1]))).astype(int)
        columns = (*CROP_COLUMNS, "keypoints", "area", "ann_id")
        rows = []
        for place in places:
            group = int(np.searchsorted(starts, place, side="right")) - 1
            table = read_row_group(self.manifest, self.split, *self.groups[group], columns)
            arrays = decode_rows(table.slice(place - starts[group], 1), self.manifest)
            rows.append({name: values[0] for name, values in arrays.items()})
        return rows


def save_predictions(file: Path, results: list[dict[str, Any]]) -> None:
    """COCO keypoint results."""
    file.write_text(json.dumps(results) + "\n")
