"""How long `hrnet validate` takes on a set of COCO's size: seconds, and against decoding every picture.

    python tests/benchmarks/bench_validate.py [--photos 64115]

Pictures are one JPEG of 640x480 with a comment of its own each. The set is made in a temporary folder; of the
second figure a part is measured and the rest reckoned, because all would take minutes. Exit code 1 where the
limit is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from hrnet_core.skeleton import COCO17
from pipelines.settings.config import DataSettings
from pipelines.validate import validate

LIMIT = 0.25
"""Of the time that decoding every picture takes, for a set of the default size."""
PART = 4000
"""Pictures that are all decoded, for the comparison."""
SPLIT = "train2017"


def write_set(root: Path, photos: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    _, encoded = cv2.imencode(".jpg", cv2.resize(noise, (640, 480)), [cv2.IMWRITE_JPEG_QUALITY, 80])
    jpeg = encoded.tobytes()
    (root / SPLIT).mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number in range(1, photos + 1):
        comment = b"\xff\xfe" + (14).to_bytes(2, "big") + b"%012d" % number
        (root / SPLIT / f"{number:012d}.jpg").write_bytes(jpeg[:2] + comment + jpeg[2:])
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": 640, "height": 480})
        for _ in range(4):
            x, y, w, h = rng.uniform((0, 0, 60, 60), (400, 250, 230, 220)).round(2).tolist()
            places = (rng.uniform(0.05, 0.95, (17, 2)) * (w, h) + (x, y)).round()
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            row |= {"bbox": [x, y, w, h], "area": w * h / 2, "num_keypoints": 17}
            triples = np.column_stack([places, np.full(17, 2)])
            annotations.append(row | {"keypoints": triples.astype(int).ravel().tolist()})
    category = {"id": 1, "name": "person", "keypoints": list(COCO17.keypoints)}
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (root / "annotations" / f"person_keypoints_{SPLIT}.json").write_text(json.dumps(content))


def seconds(root: Path, most: int) -> float:
    start = time.perf_counter()
    found = validate(root, DataSettings(train_split=SPLIT, val_split=SPLIT), most=most, workers=2)
    if found.fatal or found.rows():
        raise RuntimeError(f"the set should be good: {found.table()}")
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=64_115)
    photos = parser.parse_args().photos
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "whole", photos)
        write_set(Path(folder) / "part", min(PART, photos))
        taken = seconds(Path(folder) / "whole", 2000)
        decoded = seconds(Path(folder) / "part", 0) * photos / min(PART, photos)
    ratio = taken / decoded
    print(f"{photos:,} pictures, {4 * photos:,} people: {taken:.1f} s with --read 2000")
    print(f"every picture decoded: about {decoded:.0f} s; ratio {ratio:.2f}, limit {LIMIT}")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
