"""The endpoint from half to twice what it can do, and its memory over ten minutes of that.

    python tests/benchmarks/bench_serve_load.py
    python tests/benchmarks/bench_serve_load.py --only memory --minutes 10

knee        answers per second of eight clients that ask as fast as they are answered; then an open loop
            (hrnet load) at parts and multiples of that rate: percentiles, 429, all else; by largest batch
memory      pictures from 64 x 64 px to 49 Mpx, twice as many as it answers: memory of the replicas, the
            median of the last fifth of the time against that of the second fifth

Network `tiny`, random weights, default places, deadline and pixels. Exit code 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np
from bench_serve import closed_loop, endpoint, picture, replicas
from ratios import exit_code, judge

from hrnet_core.images import encode_jpeg
from pipelines.benchmark import machine
from pipelines.load import Load, load
from serve.settings import Limits

OF_KNEE = (0.5, 0.75, 1.0, 1.5, 2.0)
SIDES = (64, 320, 640, 1280, 2000, 4000, 7000)
"""px; the last is the largest picture that is taken."""
GROWTH = 1.05
EVERY_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=4, help="of a request")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--seconds", type=float, default=30, help="of each rate")
    parser.add_argument("--minutes", type=float, default=10, help="of memory")
    parser.add_argument("--only", nargs="*", default=["knee", "memory"])
    args = parser.parse_args()
    print(f"{machine('cpu')}, load {os.getloadavg()[0]:.1f}", flush=True)
    if "knee" in args.only:
        for batch in args.batches:
            with endpoint("tiny", threads=1, deadline_s=30, max_batch_people=batch) as (url, _):
                around_the_knee(url, args.people, args.seconds, batch)
    if "memory" in args.only:
        with endpoint("tiny", threads=1, deadline_s=30) as (url, _):
            memory(url, args.minutes * 60)
    return exit_code()


def around_the_knee(url: str, people: int, seconds: float, batch: int) -> None:
    data, boxes = picture(people)
    knee = closed_loop(url, data, boxes, 8, seconds)
    print(f"batches of {batch} people at most: {knee:.1f} requests/s of {people} people", flush=True)
    rates = [round(part * knee, 2) for part in OF_KNEE]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.jpg").write_bytes(data)
        Path(folder, "boxes.json").write_text(json.dumps({"a.jpg": boxes}))
        told = load(url, [f"{folder}/a.jpg"], rates=rates, seconds=seconds, boxes=f"{folder}/boxes.json")
    print(told, flush=True)
    half, twice = (row.figures() for row in (told.rows[0], told.rows[-1]))
    judge(f"share of 429 at half the knee, batches of {batch}", half["share_429"], 0)
    judge(f"p99 at twice the knee, batches of {batch}, s", twice["p99_ms"] / 1000, 30)
    judge(f"neither answered nor refused, batches of {batch}", others(told), 0)


def others(told: Load) -> int:
    """Requests that got neither an answer nor 429."""
    counts = (row.figures()["statuses"] for row in told.rows)
    return sum(n for each in counts for status, n in each.items() if status not in ("200", "429"))


def memory(url: str, seconds: float) -> None:
    seen: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            seen.append(sum(process.memory_info().rss for process in replicas()) / 1e6)

    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            assert side**2 <= Limits().max_pixels
            patches = np.random.default_rng(side).integers(0, 256, (9, 9, 3), np.uint8)
            image = cv2.resize(patches, (side, side), interpolation=cv2.INTER_LINEAR)
            Path(folder, f"{side}.jpg").write_bytes(encode_jpeg(image))
        asked = {
            f"{side}.jpg": [[side * x, side * 0.1, side * 0.2, side * 0.8] for x in (0.1, 0.4, 0.7)]
            for side in SIDES
        }
        Path(folder, "boxes.json").write_text(json.dumps(asked))
        given = {"boxes": f"{folder}/boxes.json", "at_once": 256}
        knee = load(url, [folder], rates=[200], seconds=5, **given).rows[0].figures()["answered_per_s"]
        print(f"pictures of {', '.join(map(str, SIDES))} px square: {knee:.1f} requests/s", flush=True)
        before = sum(process.memory_info().rss for process in replicas()) / 1e6
        watcher = threading.Thread(target=watch)
        watcher.start()
        told = load(url, [folder], rates=[round(2 * knee, 2)], seconds=seconds, **given)
        ended.set()
        watcher.join()
    print(told, flush=True)
    fifth = max(1, len(seen) // 5)
    early, late = statistics.median(seen[fifth : 2 * fifth]), statistics.median(seen[-fifth:])
    print(f"MB: {before:.0f} before, {early:.0f} early, {late:.0f} late, {max(seen):.0f} at most", flush=True)
    judge("memory late of memory early", late / early, GROWTH)
    judge("neither answered nor refused", others(told), 0)


if __name__ == "__main__":
    sys.exit(main())
