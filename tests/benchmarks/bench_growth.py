"""What grows with the dataset on one machine, the driver's: annotations, plan, manifest, listing.

    python tests/benchmarks/bench_growth.py                                          several minutes
    python tests/benchmarks/bench_growth.py --people 2000 20000 --shards 74 740      a quick look

On Linux. Seconds are CPU time, which other work on the machine changes little. Each is measured at sizes ten
times apart, and the larger is held against ten times the smaller: what grows faster than the data is a miss.
Figures for other sizes follow by multiplication (docs/scale.md). Pictures and shards are names without
content: nothing here opens one. Exit code 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import bucket_server
from ratios import exit_code, judge

from hrnet_core.skeleton import COCO17
from pipelines.settings.config import DataSettings
from pipelines.shards.manifest import Manifest, write_manifest
from pipelines.shards.plan import plan_shards
from pipelines.shards.recipe import Recipe
from pipelines.shards.schema import Shard, shard_name
from pipelines.sources.coco import read_coco
from pipelines.storage.files import join, writing_many

PEOPLE_OF_A_SHARD, PEOPLE_OF_A_GROUP = 2048, 128
PEOPLE_OF_A_PHOTO = 2
VERIFIED_BYTES = 16_000_000
FASTER_THAN_THE_DATA = 2.0
"""Of ten times the data, in units of ten times the cost. Sorting, and caches that no longer hold all, cost
some of it; what grows with the square would be 10."""
SPLIT = "train2017"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, nargs="+", default=[15_000, 150_000], help="annotated")
    parser.add_argument("--shards", type=int, nargs="+", default=[732, 7_320, 73_200], help="of a manifest")
    parser.add_argument("--bucket", type=int, default=8_000, help="most shards that go into a bucket as well")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_and_plan(arguments.read)))
        return 0
    with tempfile.TemporaryDirectory(prefix="hrnet-growth-") as folder:
        annotations(Path(folder), arguments.people)
        manifests(Path(folder), arguments.shards)
        verified(Path(folder), [10, 100])
        in_a_bucket([shards for shards in arguments.shards if shards <= arguments.bucket])
    return exit_code()


def held(what: str, sizes: list[int], costs: list[float]) -> None:
    """Each cost against the one before it, times as much as the data is more."""
    for (size, cost), (larger, more) in pairwise(zip(sizes, costs, strict=True)):
        ratio = more / cost / (larger / size)
        judge(f"{what}, {larger:,} against {larger // size} times {size:,}", ratio, FASTER_THAN_THE_DATA)


# --- annotations and plan ---------------------------------------------------------------------------------


def annotations(folder: Path, sizes: list[int]) -> None:
    found = []
    print("| people | annotation file, MB | read, CPU s | MB of the driver | plan, CPU s | MB to the tasks |")
    for people in sizes:
        root = folder / str(people)
        size = write_set(root, people)
        command = [sys.executable, __file__, "--read", str(root)]
        one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found.append(one)
        cells = (one["read"], one["memory"] / 1e6, one["plan"], one["sent"] / 1e6)
        print(
            f"| {people:,} | {size / 1e6:,.1f} | " + " | ".join(f"{c:,.2f}" for c in cells) + " |", flush=True
        )
    held("annotations, read and planned", sizes, [one["read"] + one["plan"] for one in found])
    for what in ("memory", "sent"):
        held(f"annotations, {what}", sizes, [one[what] for one in found])


def write_set(root: Path, people: int) -> int:
    """A COCO folder of that many people on names of pictures; bytes of its annotation file."""
    rng = np.random.default_rng(0)
    (root / SPLIT).mkdir(parents=True)
    (root / "annotations").mkdir()
    images, rows = [], []
    for number in range(1, people // PEOPLE_OF_A_PHOTO + 1):
        (root / SPLIT / f"{number:012d}.jpg").touch()
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": 640, "height": 480})
        for _ in range(PEOPLE_OF_A_PHOTO):
            x, y, w, h = rng.uniform((0, 0, 60, 60), (400, 250, 230, 220)).round(2).tolist()
            places = (rng.uniform(0.05, 0.95, (17, 2)) * (w, h) + (x, y)).round()
            triples = np.column_stack([places, np.full(17, 2)]).astype(int).ravel().tolist()
            row = {"id": len(rows) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            rows.append(
                row | {"bbox": [x, y, w, h], "area": w * h / 2, "num_keypoints": 17, "keypoints": triples}
            )
    category = {"id": 1, "name": "person", "keypoints": list(COCO17.keypoints)}
    file = root / "annotations" / f"person_keypoints_{SPLIT}.json"
    file.write_text(json.dumps({"images": images, "annotations": rows, "categories": [category]}))
    return file.stat().st_size


def read_and_plan(root: Path) -> dict[str, float]:
    """Of a process of its own: CPU seconds, and the most memory above what it had before it read."""
    before = peak_bytes()
    start = time.process_time()
    split = read_coco(root, SPLIT, COCO17)
    read = time.process_time()
    works = plan_shards(split, DataSettings(root=str(root), shards=str(root / "shards")))
    planned = time.process_time()
    sent = sum(len(pickle.dumps(work)) for work in works)
    taken = {"read": read - start, "plan": planned - read, "sent": float(sent)}
    return taken | {"memory": float(peak_bytes() - before)}


def peak_bytes() -> int:
    """Of this program alone: ru_maxrss would begin with that of the process that started it."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line) * 1024


# --- the manifest -----------------------------------------------------------------------------------------


def manifests(folder: Path, sizes: list[int]) -> None:
    found: list[tuple[float, float]] = []
    print("| shards | people | manifest, MB | loaded from a disk, CPU s |")
    for count in sizes:
        place = folder / f"shards-{count}"
        (place / "data").mkdir(parents=True)
        shards = made_up(count)
        for shard in shards:
            (place / shard.path).touch()
        write_manifest(str(place), fields_of(shards))
        size = (place / "manifest.json").stat().st_size
        found.append((size, min(load_seconds(place, count) for _ in range(3))))
        people = count * PEOPLE_OF_A_SHARD
        print(f"| {count:,} | {people:,} | {size / 1e6:,.2f} | {found[-1][1]:,.2f} |", flush=True)
    for what, costs in zip(("bytes", "load"), zip(*found, strict=True), strict=True):
        held(f"manifest, {what}", sizes, list(costs))


def load_seconds(place: Path, count: int) -> float:
    start = time.process_time()
    manifest = Manifest.load(place)
    seconds = time.process_time() - start
    assert len(manifest.shards(SPLIT)) == count
    return seconds


def verified(folder: Path, sizes: list[int]) -> None:
    """What `hrnet train` does with every shard before it starts, of files of zeros: hashing alone, without a
    disk or a network in it."""
    costs = []
    content = bytes(VERIFIED_BYTES)
    for count in sizes:
        place = folder / f"verified-{count}"
        (place / "data").mkdir(parents=True)
        sha256 = hashlib.sha256(content).hexdigest()
        shards = [replace(shard, bytes=len(content), sha256=sha256) for shard in made_up(count)]
        for shard in shards:
            with (place / shard.path).open("wb") as file:
                file.truncate(len(content))
        write_manifest(str(place), fields_of(shards))
        manifest = Manifest.load(place)
        start = time.process_time()
        manifest.verify()
        costs.append(time.process_time() - start)
        print(f"verified: {count * len(content) / costs[-1] / 1e9:.2f} GB in a CPU second", flush=True)
    held("verified", sizes, costs)


def in_a_bucket(sizes: list[int]) -> None:
    """Requests do not depend on the machine; the seconds are those of moto's server, which is no S3."""
    if not sizes:
        return
    asked = []
    print("| shards | requests of a load from a bucket | s, by moto |")
    with bucket_server.running() as bucket:
        os.environ.update(bucket_server.environment(bucket))
        from pyarrow import fs

        fs.S3FileSystem(endpoint_override=bucket.address, allow_bucket_creation=True).create_dir("growth")
        for count in sizes:
            place, shards = f"s3://growth/{count}", made_up(count)
            with writing_many() as put:
                for shard in shards:
                    put(join(place, shard.path), b"")
            write_manifest(place, fields_of(shards))
            bucket.asked.clear()
            start = time.perf_counter()
            Manifest.load(place)
            seconds = time.perf_counter() - start
            asked.append(float(len(bucket.asked)))
            print(f"| {count:,} | {len(bucket.asked)} | {seconds:,.2f} |", flush=True)
    held("bucket, requests", sizes, asked)


def made_up(count: int) -> list[Shard]:
    """Shards of no bytes."""
    groups = (PEOPLE_OF_A_GROUP,) * (PEOPLE_OF_A_SHARD // PEOPLE_OF_A_GROUP)
    rng = np.random.default_rng(0)
    return [
        Shard(
            path=shard_name(SPLIT, 0, index, count),
            variant=0,
            rows=PEOPLE_OF_A_SHARD,
            people=PEOPLE_OF_A_SHARD,
            bytes=0,
            sha256=rng.bytes(32).hex(),
            row_groups=groups,
        )
        for index in range(count)
    ]


def fields_of(shards: list[Shard]) -> dict[str, Any]:
    people = len(shards) * PEOPLE_OF_A_SHARD
    split = {
        "annotation_file": f"annotations/person_keypoints_{SPLIT}.json",
        "annotation_sha256": "00" * 32,
        "plan": "00" * 32,
        "photos": people // PEOPLE_OF_A_PHOTO,
        "people": people,
        "variants": 1,
        "rejected": {},
        "repaired": {},
        "shards": [asdict(shard) for shard in shards],
    }
    recipe = Recipe.of(DataSettings(train_split=SPLIT, val_split=SPLIT))
    return {
        "config": recipe.as_dict(),
        "splits": {SPLIT: split},
        "code": {},
        "rejected": {"rows": 0, "sha256": "00" * 32},
    }


if __name__ == "__main__":
    sys.exit(main())
