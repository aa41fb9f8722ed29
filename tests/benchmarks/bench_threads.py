"""What a second CPU is worth to one shard of preprocess, and to one unit of evaluate.

    python tests/benchmarks/bench_threads.py                       three minutes on a quiet machine
    python tests/benchmarks/bench_threads.py --people 1000 --rounds 3

Both sides run in turn on the same two cores: one shard by two threads against one, in crops, cuts and eight
variants; one unit of W32 with a flip test by two passes at a time against one after the other. They must give
the same bytes. Seconds by the clock need a machine with nothing else to do; CPU seconds hardly do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from bench_preprocess import SPLITS, drawn, repeated
from ratios import compare, exit_code, judge, with_memory_kept

from hrnet_core.predictor import PosePredictor
from hrnet_core.skeleton import COCO17
from pipelines.benchmark import save_random
from pipelines.poses.actor import Threads
from pipelines.settings.config import DataSettings
from pipelines.settings.config_file import load_config
from pipelines.shards.build import build_shard
from pipelines.shards.plan import plan_shards
from pipelines.sources.coco import read_coco

SHARD = {"crops": {"context": 1.0}, "cuts": {"context": 2.0}, "8 variants": {"context": 1.0, "variants": 8}}
AT_MOST = 0.6
"""Of the seconds of one thread: half of them, and what is written at the end or waits for Python's lock."""
MORE_CPU = 1.15
BATCH = 8
Build = Callable[[int], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=2048, help="people in the shard")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    arguments = parser.parse_args()
    with_memory_kept()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hrnet-bench-") as name:
        folder = Path(name)
        photos = drawn(folder / "drawn", arguments.people // 3)
        coco = repeated(photos, folder / "coco", arguments.people)
        for kind, settings in SHARD.items():
            timed(f"a shard of {kind}", shard(coco, folder / kind, settings), arguments.rounds)
        timed("a unit of W32", unit(folder / "w32"), arguments.rounds)
    print(f"load {os.getloadavg()[0]:.1f}")
    return exit_code()


def timed(what: str, run: Build, rounds: int) -> None:
    """By the clock, then by CPU time."""
    if run(1) != run(2):
        sys.exit(f"{what}: two threads give other bytes")
    ratio, two, one = compare(lambda: run(2), lambda: run(1), rounds)
    judge(f"{what}, seconds of two threads ({two:.2f}) / of one ({one:.2f})", ratio, AT_MOST)
    ratio, two, one = compare(lambda: run(2), lambda: run(1), rounds, time.process_time)
    judge(f"{what}, CPU seconds of two threads ({two:.2f}) / of one ({one:.2f})", ratio, MORE_CPU)


def shard(coco: Path, folder: Path, settings: dict[str, Any]) -> Build:
    """Builds the one shard of a folder anew by so many threads."""
    data = DataSettings(root=str(coco), shards=str(folder), people_per_shard=10**6, **settings)
    (work,) = plan_shards(read_coco(data.root, SPLITS[0], COCO17), data)

    def build(threads: int) -> Any:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "data").mkdir(parents=True)
        return build_shard(replace(work, folder=str(folder)), threads)

    return build


def unit(checkpoint: Path) -> Build:
    """Two batches in the network, so many at a time."""
    save_random(checkpoint, load_config("w32_256x192"))
    predictor: Any = PosePredictor.load(checkpoint, "cpu", "float32")
    predictor.finish = lambda _, *found: [part.tobytes() for part in found]  # as they left the network
    crops = np.random.default_rng(0).integers(0, 256, (2 * BATCH, 256, 192, 3), np.uint8)
    of_passes = {passes: Threads(predictor, passes, passes) for passes in (1, 2)}
    people: Any = [SimpleNamespace(crops=crops)]
    return lambda passes: of_passes[passes].predict(people, True, BATCH)


if __name__ == "__main__":
    sys.exit(main())
