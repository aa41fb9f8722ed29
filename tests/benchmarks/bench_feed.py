"""Samples per second of the training feed against what no feed could avoid, and against a published loader.

    python tests/benchmarks/bench_feed.py                  drawn photographs
    python tests/benchmarks/bench_feed.py --coco COCO      a COCO root, repeated up to --people

    stored views   ours / plain processes that only read and inflate the same columns and decode the crops
    fresh views    ours / plain processes that only decode the cuts, whose bytes they hold already
    published      stored views / torch's DataLoader doing a sample as the published loader does: imread of
                   the photograph, one warp, normalising, a heatmap a keypoint in a Python loop
    seam           how long a network waits for the first batch of an epoch, in steps

Each side runs on the same cores, with as many threads or processes as there are cores, in turns (ours, other,
ours, other, ...), and the median of the pairs counts: of samples a CPU second, because other work on the
machine takes wall time from both, and takes more from whoever has to wait; wall time is printed beside it.
On a quiet machine (--wall) wall time is judged. Exit code 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from bench_preprocess import drawn, repeated, run_hrnet
from ratios import exit_code, judge, with_memory_kept
from torch.utils.data import DataLoader, Dataset

from hrnet_core.augment import draw, plain_view, random_view, view_to_crop
from hrnet_core.geometry import apply_affine, box_to_center_scale
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import normalize
from hrnet_core.skeleton import COCO17
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.training.feed import FRESH, STORED, Feed

SPLIT = "train2017"
CORES = (1, 2)
OF_LIMIT = 0.80
OF_PUBLISHED = 7.0
SEAM = 1.0
PUBLISHED_SAMPLES = 512


# --- the sides: each gives a function that goes through its samples once, and returns their number -----


def ours(folder: str, views: str, cores: int, part: int) -> Callable[[], int]:
    feed = Feed(Manifest.load(folder), SPLIT, TrainSettings(views=views, cpus_per_worker=cores))
    epochs = iter(range(10**6))

    def run() -> int:
        return sum(batch.rows for batch in feed.batches(next(epochs)))

    return run


def plain(folder: str, views: str, cores: int, part: int) -> Callable[[], int]:
    """Process `part` of `cores`."""
    files = [f"{folder}/{shard.path}" for shard in Manifest.load(folder).shards(SPLIT)]
    groups = [(file, g) for file in files for g in range(pq.ParquetFile(file).num_row_groups)][part::cores]
    columns = list(STORED if views == "stored" else FRESH)

    def read() -> Iterator[list[Any]]:
        for file, group in groups:
            with pq.ParquetFile(file) as parquet:
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
            yield [item.as_buffer() for item in table["image"].chunk(0).field("bytes")]

    held = list(read()) if views == "device" else None

    def run() -> int:
        samples = 0
        for pictures in held or read():
            for picture in pictures:
                cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR_RGB)
            samples += len(pictures)
        return samples

    return run


class Published(Dataset[Any]):
    """A sample as the published loader makes one, from its description; the view is drawn by our own code."""

    def __init__(self, coco: str) -> None:
        root = Path(coco)
        content = json.loads((root / f"annotations/person_keypoints_{SPLIT}.json").read_text())
        names = {image["id"]: str(root / SPLIT / image["file_name"]) for image in content["images"]}
        people = [a for a in content["annotations"] if a["num_keypoints"] and not a["iscrowd"]]
        self.rows = [(names[a["image_id"]], a["bbox"], a["keypoints"]) for a in people[:PUBLISHED_SAMPLES]]
        self.codec = HeatmapCodec("official")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        name, box, keypoints = self.rows[index]
        image = cv2.cvtColor(cv2.imread(name), cv2.COLOR_BGR2RGB)
        points = np.array(keypoints, np.float32).reshape(17, 3)
        view = plain_view(*box_to_center_scale(np.array(box), self.codec.input_size))
        draws = draw(np.random.default_rng(index))
        shape = points[:, :2], points[:, 2], COCO17, self.codec.input_size
        matrix = view_to_crop(random_view(draws, view.center, view.scale, *shape), self.codec, image.shape[1])
        crop = cv2.warpAffine(image, matrix, self.codec.input_size, flags=cv2.INTER_LINEAR)
        tensor = normalize(torch.from_numpy(crop)[None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[0]
        heatmaps, weights = gaussians(apply_affine(matrix, points[:, :2]), points[:, 2] > 0)
        return tensor, torch.from_numpy(heatmaps), torch.from_numpy(weights)


def gaussians(places: Any, labelled: Any, sigma: int = 2) -> tuple[Any, Any]:
    """places (K, 2) in crop px: one map after the other, a patch of 6 sigma + 1 cells put into each."""
    heatmaps, weights = np.zeros((len(places), 64, 48), np.float32), labelled.astype(np.float32)
    for joint, (x, y) in enumerate(places):
        left, top = int(x / 4 + 0.5) - 3 * sigma, int(y / 4 + 0.5) - 3 * sigma
        size = 6 * sigma + 1
        if left >= 48 or top >= 64 or left + size < 0 or top + size < 0:
            weights[joint] = 0
        if weights[joint] == 0:
            continue
        cells = np.arange(size, dtype=np.float32)
        patch = np.exp(-((cells - size // 2) ** 2 + (cells[:, None] - size // 2) ** 2) / (2 * sigma**2))
        x0, y0, x1, y1 = max(0, left), max(0, top), min(48, left + size), min(64, top + size)
        heatmaps[joint, y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    return heatmaps, weights


def published(folder: str, views: str, cores: int, part: int) -> Callable[[], int]:
    data = Published(folder)
    loader = DataLoader(data, 64, shuffle=True, num_workers=cores, persistent_workers=True)

    def run() -> int:
        return sum(len(images) for images, _, _ in loader)

    return run


SIDES = {"ours": ours, "plain": plain, "published": published}


def serve(name: str, folder: str, views: str, cores: int, part: int) -> None:
    """A side in a process of its own: a line in, one time through, a line of JSON out."""
    cpus = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, cpus)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    run = SIDES[name](folder, views, cores, part)
    run()  # warm
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu, begun = cpu_seconds(), time.perf_counter()
        samples = run()
        figures = samples, time.perf_counter() - begun, cpu_seconds() - cpu
        print(json.dumps(figures), flush=True)


def cpu_seconds() -> float:
    """Of this process and its children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


# --- the comparison -----------------------------------------------------------------------------------


class Side:
    def __init__(self, name: str, folder: Path, views: str, cores: int) -> None:
        parts = range(cores if name == "plain" else 1)
        arguments = [sys.executable, __file__, "--side", name, str(folder), views, str(cores)]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.processes = [subprocess.Popen([*arguments, str(part)], **pipes) for part in parts]
        for process in self.processes:
            if self._line(process) != "ready\n":
                sys.exit(f"{name} did not start")

    def go(self) -> tuple[float, float]:
        """(samples a second, samples a CPU second) of one time through."""
        for process in self.processes:
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        samples, walls, cpus = zip(*(json.loads(self._line(p)) for p in self.processes), strict=True)
        return sum(samples) / max(walls), sum(samples) / sum(cpus)

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        return process.stdout.readline()  # type: ignore[union-attr]


def compare(text: str, limit: float, us: Side, other: Side, rounds: int, wall: bool) -> None:
    pairs = [(us.go(), other.go()) for _ in range(rounds)]
    us.end()
    other.end()
    ratios = [[ours[i] / others[i] for ours, others in pairs] for i in (0, 1)]
    speeds = [[statistics.median(pair[side][i] for pair in pairs) for side in (0, 1)] for i in (0, 1)]
    for i, unit in ((0, "s"), (1, "CPU s")):
        low, high = min(ratios[i]), max(ratios[i])
        line = f"{speeds[i][0]:,.0f} and {speeds[i][1]:,.0f} samples a {unit}"
        print(f"      {line}, ratio {statistics.median(ratios[i]):.2f} ({low:.2f} to {high:.2f})")
    judge(text, statistics.median(ratios[0 if wall else 1]), limit, at_most=False)


def seam(stored: Path) -> None:
    """A network that takes half of what the feed can give, over four epochs of four windows: its waiting for
    the first batch of an epoch, against the step."""
    settings = TrainSettings(batch_size=32, cpus_per_worker=2, shuffle_row_groups=1)
    feed = Feed(Manifest.load(str(stored)), SPLIT, settings)
    begun = time.perf_counter()
    rows = sum(batch.rows for batch in feed.batches(0))
    step = 2 * (time.perf_counter() - begun) / rows * settings.batch_size
    waits: list[float] = []
    for _ in timed(feed.batches(0, 0, 4), waits):
        time.sleep(step)
    first = [waits[number] for number in range(feed.steps, 4 * feed.steps, feed.steps)]
    print(f"      step {step * 1000:.0f} ms; waits at seams {', '.join(f'{w * 1000:.1f}' for w in first)} ms")
    judge("longest wait for an epoch's first batch, in steps", max(first) / step, SEAM)


def timed(batches: Iterator[Any], waits: list[float]) -> Iterator[Any]:
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        waits.append(time.perf_counter() - begun)
        yield batch


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=["stored", "fresh", "published", "seam"])
    parser.add_argument("--people", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--coco", type=Path, help="a COCO root to repeat instead of drawing")
    parser.add_argument("--work", type=Path, help="folder for all files, kept and used again")
    parser.add_argument("--wall", action="store_true", help="judge wall time: on a quiet machine")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        name, folder, views, cores, part = args.side
        serve(name, folder, views, int(cores), int(part))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        coco, stored, cuts = (work / name for name in ("coco", "stored", "cuts"))
        if not cuts.exists():
            repeated(args.coco or drawn(work / "drawn", 500), coco, args.people)
            for shards, context in ((stored, "1.0"), (cuts, "2.0")):
                places = "--data.root", str(coco), "--data.shards", str(shards)
                run_hrnet("preprocess", "w32_256x192", *places, "--data.context", context)
        load = os.getloadavg()[0]
        print(
            f"{psutil.cpu_count()} cores, load {load:.1f}; torch {torch.__version__}, cv2 {cv2.__version__}"
        )
        for cores in (c for c in CORES if c <= len(os.sched_getaffinity(0))):
            how = args.rounds, args.wall
            for name, shards, views in (("stored", stored, "stored"), ("fresh", cuts, "device")):
                if name in args.only:
                    sides = Side("ours", shards, views, cores), Side("plain", shards, views, cores)
                    compare(f"{name} views / plain processes, {cores} core(s)", OF_LIMIT, *sides, *how)
            if "published" in args.only:
                sides = Side("ours", stored, "stored", cores), Side("published", coco, "", cores)
                compare(f"stored views / published loader, {cores} core(s)", OF_PUBLISHED, *sides, *how)
        if "seam" in args.only:
            seam(stored)
    return exit_code()


if __name__ == "__main__":
    with_memory_kept()
    sys.exit(main())
