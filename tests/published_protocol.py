"""The published evaluation, written down once more the slow way: one person, one keypoint at a time.

Nothing here comes from hrnet_core but the network: crops, decoding, rescoring and OKS-NMS follow the
published formulas directly (facts in the docstrings), the figures are pycocotools' own. Official protocol
only: detector boxes, flip test with shift, quarter offset.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

PAIRS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)]
SIGMAS = [
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072,
    0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089,
]  # fmt: skip


def published_stats(
    network: torch.nn.Module, root: Path, boxes: Path, input_size: tuple[int, int], split: str = "val2017"
) -> list[float]:
    """The ten figures."""
    truth_file = root / "annotations" / f"person_keypoints_{split}.json"
    images = {i["id"]: i for i in json.loads(truth_file.read_text())["images"]}
    results = []
    for image_id in sorted(images):
        picture = cv2.imread(str(root / split / images[image_id]["file_name"]))[..., ::-1]
        found = [
            _pose(network, picture, box, input_size)
            for box in json.loads(boxes.read_text())
            if box["image_id"] == image_id
        ]
        results += [{**pose, "image_id": image_id, "category_id": 1} for pose in _nms(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        rows = [{k: v for k, v in copy.deepcopy(r).items() if k != "area"} for r in results]
        evaluator = COCOeval(truth, truth.loadRes(rows), "keypoints")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


def _pose(
    network: torch.nn.Module, picture: NDArray[Any], box: dict[str, Any], input_size: tuple[int, int]
) -> dict[str, Any]:
    width, height = input_size
    x, y, w, h = box["bbox"]
    center = (x + w / 2, y + h / 2)
    w, h = 1.25 * max(w, h * width / height), 1.25 * max(h, w * height / width)
    # Three points: the centre, w / 2 above it, and a quarter turn about that one.
    photo = [center, (center[0], center[1] - w / 2), (center[0] - w / 2, center[1] - w / 2)]
    crop = [(width / 2, height / 2), (width / 2, height / 2 - width / 2), (0, height / 2 - width / 2)]
    matrix = cv2.getAffineTransform(np.float32(photo), np.float32(crop))
    pixels = cv2.warpAffine(np.ascontiguousarray(picture), matrix, input_size, flags=cv2.INTER_LINEAR)
    plain = _heatmaps(network, pixels)
    mirrored = _heatmaps(network, pixels[:, ::-1])[:, :, ::-1]
    for a, b in PAIRS:
        mirrored[[a, b]] = mirrored[[b, a]]
    mirrored[:, :, 1:] = mirrored[:, :, :-1].copy()
    heatmaps = (plain + mirrored) / 2
    back = cv2.invertAffineTransform(matrix)
    keypoints, scores = [], []
    for one in heatmaps:
        row, column = np.unravel_index(one.argmax(), one.shape)
        px, py = float(column), float(row)
        if 1 < column < one.shape[1] - 1 and 1 < row < one.shape[0] - 1:
            px += 0.25 * np.sign(one[row, column + 1] - one[row, column - 1])
            py += 0.25 * np.sign(one[row + 1, column] - one[row - 1, column])
        if one.max() <= 0:
            px = py = 0.0
        keypoints += [*(back @ [4 * px, 4 * py, 1]).tolist(), float(one.max())]
        scores.append(float(one.max()))
    good = [s for s in scores if s > 0.2]
    return {
        "keypoints": keypoints,
        "score": box["score"] * (math.fsum(good) / len(good) if good else 0),
        "area": w * h,
    }


def _heatmaps(network: torch.nn.Module, pixels: NDArray[Any]) -> NDArray[Any]:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normal = ((pixels / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)
    with torch.no_grad():
        return network(torch.from_numpy(normal[None].copy()))[0].numpy().copy()


def _nms(poses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hard OKS-NMS at 0.9; the kept in the order of the detector's file."""
    order = sorted(range(len(poses)), key=lambda i: -poses[i]["score"])
    kept: list[int] = []
    for i in order:
        if all(_oks(poses[i], poses[j]) <= 0.9 for j in kept):
            kept.append(i)
    return [poses[i] for i in sorted(kept)]


def _oks(one: dict[str, Any], other: dict[str, Any]) -> float:
    area = (one["area"] + other["area"]) / 2
    terms = []
    for k, sigma in enumerate(SIGMAS):
        dx = one["keypoints"][3 * k] - other["keypoints"][3 * k]
        dy = one["keypoints"][3 * k + 1] - other["keypoints"][3 * k + 1]
        terms.append(math.exp(-(dx * dx + dy * dy) / (2 * area * (2 * sigma) ** 2)))
    return sum(terms) / len(terms)
