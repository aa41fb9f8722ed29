"""A COCO root that a tiny untrained network can solve, for tests of whole chains.

A person is 17 discs, each keypoint in a colour of its own, scattered like a standing body. The network is
a small HRNet with random weights whose last layer is fitted by least squares: features -> target heatmaps.
"""

from __future__ import annotations

import colorsys
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, load_checkpoint, read_exported, save_checkpoint
from hrnet_core.geometry import apply_affine, box_to_center_scale, crop_people
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet, normalize
from hrnet_core.skeleton import COCO17
from pipelines.poses.actor import Actor, Unit, Work
from pipelines.settings.config import RaySettings, WorkerSettings

SMALL = HRNetConfig(width=32, stem_width=32, bottlenecks=1, modules=(1, 1, 1), blocks=1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A standing body in a box of 1 x 1: x, y of COCO's 17 keypoints.
BODY = np.array(
    [
        [0.50, 0.06], [0.56, 0.03], [0.44, 0.03], [0.62, 0.06], [0.38, 0.06], [0.70, 0.20], [0.30, 0.20],
        [0.82, 0.35], [0.18, 0.35], [0.90, 0.50], [0.10, 0.50], [0.62, 0.52], [0.38, 0.52],
        [0.64, 0.74], [0.36, 0.74], [0.66, 0.96], [0.34, 0.96],
    ]
)  # fmt: skip
COLORS = [
    tuple(int(255 * c) for c in colorsys.hsv_to_rgb(k / 17, 1, 1 if k % 2 else 0.55)) for k in range(17)
]


def write_coco(root: Path, photos: int = 6, people: int = 2, split: str = "val2017", seed: int = 0) -> Path:
    """ROOT/annotations/person_keypoints_SPLIT.json and ROOT/SPLIT/*.png; ids 100, 101, ... and 1, 2, ..."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(photos):
        width, height = 200 + 8 * index, 160
        picture = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
        image_id, name = 100 + index, f"picture-{index}.png"
        for place in range(people):
            box = np.array([10 + 95 * place, 12, 70, 130], float) + rng.uniform(-4, 4, 4)
            points = (box[:2] + (BODY + rng.normal(0, 0.03, BODY.shape)) * box[2:]).round(1)
            visible = rng.choice([0, 1, 2], 17, p=[0.1, 0.1, 0.8])
            for (x, y), color in zip(points, COLORS, strict=True):
                cv2.circle(picture, (round(x), round(y)), 5, color, -1)
            triples = np.concatenate([points * (visible > 0)[:, None], visible[:, None]], axis=1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": box.round(2).tolist(),
                    "area": float((box[2] * box[3] * 0.6).round(2)),
                    "iscrowd": 0,
                    "num_keypoints": int((visible > 0).sum()),
                    "keypoints": triples.ravel().tolist(),
                }
            )
        cv2.imwrite(str(root / split / name), picture[..., ::-1])
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    categories = [{"id": 1, "name": "person", "keypoints": list(COCO17.keypoints), "skeleton": []}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(content))
    return root


def write_solved(folder: Path, codec: HeatmapCodec, photos: int = 6) -> tuple[Path, Path]:
    """FOLDER/coco of 2 people a picture, and FOLDER/checkpoint that finds most of them."""
    root, checkpoint = write_coco(folder / "coco", photos), folder / "checkpoint"
    save_checkpoint(checkpoint, fitted_network(root, codec), CheckpointSpec(SMALL, codec))
    return root, checkpoint


def truth_of(root: Path, split: str = "val2017") -> dict[str, Any]:
    return json.loads((root / "annotations" / f"person_keypoints_{split}.json").read_text())


def write_detections(root: Path, file: Path, split: str = "val2017", seed: int = 1) -> Path:
    """A detector's file: each box moved a little, every third twice, and a false one in each picture."""
    rng = np.random.default_rng(seed)
    rows = []
    truth = truth_of(root, split)
    for annotation in truth["annotations"]:
        box = np.array(annotation["bbox"]) + rng.uniform(-3, 3, 4)
        rows.append(_detection(annotation["image_id"], box, rng.uniform(0.8, 1)))
        if annotation["id"] % 3 == 0:  # near enough for OKS-NMS to see the same person
            rows.append(_detection(annotation["image_id"], box + 0.2, rng.uniform(0.3, 0.9)))
    rows += [_detection(image["id"], np.array([2.0, 3, 20, 30]), 0.2) for image in truth["images"]]
    rng.shuffle(rows)
    file.write_text(json.dumps(rows))
    return file


def _detection(image_id: int, box: NDArray[Any], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": box.round(2).tolist(), "score": round(score, 4)}


def fitted_network(root: Path, codec: HeatmapCodec, split: str = "val2017", seed: int = 0) -> HRNet:
    """SMALL with random weights and a last layer fitted to the split's people (ridge regression)."""
    torch.manual_seed(seed)
    network = HRNet(SMALL).eval()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    truth = truth_of(root, split)
    crops, targets = [], []
    for image in truth["images"]:
        picture = cv2.imread(str(root / split / image["file_name"]))[..., ::-1].copy()
        here = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        center, scale = box_to_center_scale([a["bbox"] for a in here], codec.input_size)
        matrices = codec.image_to_crop_matrix(center, scale)
        crops.append(crop_people(picture, matrices, codec.input_size))
        triples = np.array([a["keypoints"] for a in here]).reshape(-1, 17, 3)
        targets.append(codec.encode(apply_affine(matrices, triples[..., :2]), triples[..., 2])[0])
    seen: list[torch.Tensor] = []
    hook = network.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(normalize(torch.from_numpy(np.concatenate(crops)), MEAN, STD))
    hook.remove()
    features = seen[0].permute(0, 2, 3, 1).reshape(-1, SMALL.width).double()
    wanted = torch.from_numpy(np.concatenate(targets)).permute(0, 2, 3, 1).reshape(-1, 17).double()
    matrix = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    # Cells near a keypoint are few: without weight they would be fitted least of all.
    weighted = matrix * (1 + 50 * wanted.amax(dim=1, keepdim=True))
    gram = weighted.T @ matrix
    solution = torch.linalg.solve(gram + 1e-9 * gram.trace() * torch.eye(len(gram)), weighted.T @ wanted)
    with torch.no_grad():
        network.final_layer.weight.copy_(solution[:-1].T[..., None, None])
        network.final_layer.bias.copy_(solution[-1])
    return network


def rows_here(
    pending: dict[int, Unit],
    work: Work,
    checkpoint: Path,
    settings: WorkerSettings,
    ray: RaySettings,
    verb: str,
    reads: Sequence[tuple[str, str]] = (),
) -> Iterator[dict[str, Any]]:
    """In place of units.rows_on_ray: the same actor, in this process and on one thread."""
    before = torch.get_num_threads()
    try:
        actor = Actor(lambda: (*load_checkpoint(checkpoint), read_exported(checkpoint)), work, settings)
        for index, unit in pending.items():
            row = actor({"unit": np.array([index]), "work": [pickle.dumps(unit)]})
            yield {name: values[0] for name, values in row.items()}
    finally:
        torch.set_num_threads(before)


def cut_short(patch: pytest.MonkeyPatch) -> list[list[int]]:
    """units.rows_on_ray here, stopped at the third unit of its first call; gives the units of each call."""
    asked: list[list[int]] = []

    def two_units_then_death(pending: dict[int, Unit], *rest: Any) -> Iterator[dict[str, Any]]:
        asked.append(list(pending))
        for count, row in enumerate(rows_here(pending, *rest)):
            if count == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield row

    patch.setattr("pipelines.poses.units.rows_on_ray", two_units_then_death)
    return asked
