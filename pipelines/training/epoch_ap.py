"""The AP of each epoch: val shards through the predictor, scored with ground-truth boxes (val_gt/AP).

Not quite `hrnet evaluate`: crops come from the shards (JPEG q95 instead of the photo), and the ground
truth is rebuilt from their rows, which have no crowds and nobody without keypoints. With ground-truth
boxes a crowd can only turn a wrong pose from counted to ignored, so the figures differ in the third digit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hrnet_core.checkpoint import CheckpointSpec
from hrnet_core.geometry import place_in_image
from hrnet_core.loss import joints_mse
from hrnet_core.pck import pck
from hrnet_core.predictor import PosePredictor
from pipelines.poses.protocol import score_poses
from pipelines.settings.config import EvaluateSettings
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_rows, read_row_group
from pipelines.sources.records import GroundTruth, People
from pipelines.training.feed import STORED

TRUTH = ("image_id", "ann_id", "keypoints", "area", "bbox_xywh")
LONGEST = 200
"""Characters of a keypoint's name in a metric's."""


def metric_names(keypoints: Sequence[str]) -> list[str]:
    """Names of keypoints without what MLflow takes in no metric's: other characters, a dot alone, more than
    250 of them with what stands before. Where two become one, their places are told with them."""
    names = [re.sub(r"[^\w. -]|^\.+$", "_", name)[:LONGEST] for name in keypoints]
    twins = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} {place}" if name in twins else name for place, name in enumerate(names)]


class Predictions(NamedTuple):
    """Poses of P people of the val split, in order of ann_id."""

    ann_ids: NDArray[np.int64]
    """(P,)"""
    keypoints: NDArray[np.float32]
    """(P, K, 2) photo px."""
    scores: NDArray[np.float32]
    """(P, K)"""
    loss: float
    """Sum over people of the official loss of the (flip-averaged) heatmaps against the stored ones."""

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Of row groups, or of all workers."""
        *columns, losses = zip(*parts, strict=True)
        arrays = [np.concatenate(column) for column in columns]
        order = np.argsort(arrays[0])
        ann_ids, keypoints, scores = (array[order] for array in arrays)
        return cls(ann_ids, keypoints, scores, sum(losses))


class ValSplit:
    """The val split as worker `rank` of `world` sees it: every world-th row group is its own."""

    def __init__(self, manifest: Manifest, split: str, rank: int = 0, world: int = 1) -> None:
        self.manifest, self.split = manifest, split
        self.groups = list(manifest.row_groups(split))
        self.own = self.groups[rank::world]

    def predict(self, predictor: PosePredictor, flip_test: bool, batch_size: int) -> Predictions:
        """Poses of this worker's people."""
        k = self.manifest.recipe.skeleton.num_keypoints
        none = np.zeros((0, k, 2), np.float32), np.zeros((0, k), np.float32)
        parts = [Predictions(np.zeros(0, np.int64), *none, 0.0)]  # a worker may have no row group
        for shard, group in self.own:
            rows = decode_rows(read_row_group(self.manifest, self.split, shard, group, STORED), self.manifest)
            heatmaps = predictor.heatmaps(rows["images"], flip_test, batch_size)
            keypoints, scores = self.manifest.recipe.codec.decode(heatmaps)
            tensors = [torch.from_numpy(np.array(a)) for a in (heatmaps, rows["heatmaps"], rows["weights"])]
            loss = float(joints_mse(*tensors)) * len(heatmaps)
            placed = place_in_image(keypoints, rows["image_to_crop"])
            parts.append(Predictions(rows["ann_id"], placed, scores, loss))
        return Predictions.join(parts)

    @cached_property
    def truth(self) -> GroundTruth:
        """All people of the split as the shards have them."""
        tables = [read_row_group(self.manifest, self.split, s, g, TRUTH) for s, g in self.groups]
        rows = decode_rows(pa.concat_tables(tables), self.manifest)
        order = np.lexsort((rows["ann_id"], rows["image_id"]))
        people = People(
            image_id=rows["image_id"],
            ann_id=rows["ann_id"],
            category_id=np.ones(len(rows["ann_id"]), np.int64),
            keypoints=rows["keypoints"].astype(np.float64),
            bbox_xywh=rows["bbox_xywh"],
            stated_xywh=rows["bbox_xywh"].astype(np.float64),
            area=rows["area"].astype(np.float64),
            score=np.ones(len(order)),
            crowd=np.zeros(len(order), bool),
        )[order]
        return GroundTruth(self.manifest.folder, np.unique(people.image_id), people)

    def score(
        self, found: Predictions, spec: CheckpointSpec, settings: EvaluateSettings
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The ten figures of COCO, and the results they are of. Each person must have been found once."""
        people = self.truth.people
        rows = self._rows(found)
        return score_poses(found.keypoints[rows], found.scores[rows], people, self.truth, spec, settings)

    def pck(self, found: Predictions) -> dict[str, float]:
        """{"left_elbow": ...}: PCK of each keypoint that someone has (hrnet_core/pck.py), by the name that
        its metric has."""
        people = self.truth.people
        xy, visible = people.keypoints[..., :2], people.keypoints[..., 2]
        shares = pck(xy, found.keypoints[self._rows(found)], visible, people.bbox_xywh)
        names = metric_names(self.manifest.recipe.skeleton.keypoints)
        return {name: share for name, share in zip(names, shares.tolist(), strict=True) if share == share}

    def _rows(self, found: Predictions) -> NDArray[np.int64]:
        """Where the people of `truth` stand in `found`."""
        people = self.truth.people
        if not np.array_equal(found.ann_ids, np.sort(people.ann_id)):
            raise RuntimeError(
                f"poses of {len(found.ann_ids)} ({len(np.unique(found.ann_ids))} different) for "
                f"{len(people)} people of {self.split}"
            )
        return np.searchsorted(found.ann_ids, people.ann_id)
