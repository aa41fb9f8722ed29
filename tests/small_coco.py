"""A small COCO folder for tests: coloured noise with a dot on each keypoint, every field in place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hrnet_core.skeleton import COCO17

CATEGORY = {"id": 1, "name": "person", "supercategory": "person", "keypoints": list(COCO17.keypoints)}


def write_coco(
    root: Path, people: dict[str, Sequence[int]], size: tuple[int, int] = (160, 120), spread: bool = False
) -> Path:
    """`people`: for each split the number of people in each picture. Image ids are 10, 20, ..., annotation
    ids 1, 2, ... in their order; all keypoints are labelled, v = 1 where the index is a multiple of 5.
    spread: people stand all over a larger picture."""
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = size
    right, down = (width - 100, height - 90) if spread else (60, 30)
    for split, counts in people.items():
        (root / split).mkdir()
        data: dict[str, Any] = {"images": [], "annotations": [], "categories": [CATEGORY]}
        for index, count in enumerate(counts):
            image_id, name = 10 * (index + 1), f"{split}-{index}.jpg"
            noise = rng.integers(0, 256, (12, 16, 3), np.uint8)
            picture = cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)
            data["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
            for _ in range(count):
                box = [rng.uniform(0, right), rng.uniform(0, down)]
                box += [rng.uniform(60, 90), rng.uniform(70, 85)]
                places = rng.uniform(0.1, 0.9, (17, 2)) * box[2:] + box[:2]
                for x, y in places:
                    cv2.circle(picture, (int(x), int(y)), 2, (0, 0, 255), -1)
                visible = np.where(np.arange(17) % 5 == 0, 1, 2)
                triples = np.concatenate([places.round(2), visible[:, None]], axis=1)
                annotation = {"id": len(data["annotations"]) + 1, "image_id": image_id, "category_id": 1}
                annotation |= {"bbox": np.round(box, 2).tolist(), "area": box[2] * box[3] / 2, "iscrowd": 0}
                annotation |= {"keypoints": triples.ravel().tolist(), "num_keypoints": 17}
                data["annotations"].append(annotation)
            cv2.imwrite(str(root / split / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
        annotation_file(root, split).write_text(json.dumps(data))
    return root


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"person_keypoints_{split}.json"


@contextlib.contextmanager
def edited(root: Path, split: str = "train2017") -> Iterator[dict[str, Any]]:
    """The annotations to change; written back at the end (NaN stays NaN)."""
    file = annotation_file(root, split)
    data = json.loads(file.read_text())
    yield data
    file.write_text(json.dumps(data))
