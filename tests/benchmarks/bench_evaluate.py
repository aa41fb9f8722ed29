"""How fast evaluation is: ratios against stated limits in the same run.

    python tests/benchmarks/bench_evaluate.py

Both sides of a ratio run in turn (A B A B ...) and the median of the pairs counts, so that other work on the
machine meets both alike. One thread. Exit code 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
import dots

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, read_spec
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from hrnet_core.modes import EXACT_ENOUGH, MODES, unusable
from hrnet_core.predictor import PosePredictor
from pipelines.config import EvaluateSettings
from pipelines.evaluate import answer, group_photos
from pipelines.export import _answers
from pipelines.poses.actor import Threads
from pipelines.poses.protocol import score_poses
from pipelines.sources.evaluation_set import EvaluationSet, read_evaluation_set

W32 = HRNetConfig()
SIZE = (192, 256)
missed: list[str] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["decode", "dark", "whole", "modes"])
    parser.add_argument("--photos", type=int, default=60, help="of two drawn people, for AP and people/s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--measured", type=Path, help="checkpoint folder after --measure-modes: its AP differences decide"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    has = torch.cpu.get_capabilities()
    vector = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if has.get(name)]
    print(
        f"{has.get('cpu_name', 'CPU')}, {', '.join(vector)}; torch {torch.__version__}, one thread",
        flush=True,
    )
    if "decode" in args.only:
        official_decode()
    if "dark" in args.only:
        dark_decode()
    if {"whole", "modes"} & set(args.only):
        with tempfile.TemporaryDirectory() as folder:
            root = dots.write_coco(Path(folder), photos=args.photos)
            network = fitted_w32(root)
            if "whole" in args.only:
                whole_evaluation(root, network)
            if "modes" in args.only:
                modes(root, network, args.rounds, args.measured)
    for text in missed:
        print(f"MISSED: {text}")
    return 1 if missed else 0


def compare(
    name: str, ours: Callable[[], Any], other: Callable[[], Any], rounds: int
) -> tuple[float, float, float]:
    """(median of the ratios of ours to other, both medians in s): B A B A ..., after one call of each."""
    ours(), other()
    pairs = []
    for _ in range(rounds):
        start = time.perf_counter()
        other()
        middle = time.perf_counter()
        ours()
        pairs.append((time.perf_counter() - middle, middle - start))
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def judge(text: str, value: float, limit: float, at_most: bool = True) -> None:
    good = value <= limit if at_most else value >= limit
    line = f"{text}: {value:.3g} (limit {'at most' if at_most else 'at least'} {limit:g})"
    print(f"{'ok  ' if good else 'MISS'}  {line}", flush=True)
    if not good:
        missed.append(line)


# --- decoding -------------------------------------------------------------------------------------------


def heatmaps(codec: HeatmapCodec, people: int) -> NDArray[np.float32]:
    """(P, 17, 64, 48): encoded keypoints under the noise of a network's answer."""
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(0.1, 0.9, (people, 17, 2)) * codec.input_size
    maps, _ = codec.encode(keypoints, np.full((people, 17), 2))
    return maps + rng.normal(0, 0.01, maps.shape).astype(np.float32)


def official_decode(people: int = 10_000, block: int = 500) -> None:
    """10,000 sets, in 20 blocks of 500 (all of them would be 2 GB)."""
    codec = HeatmapCodec("official", SIZE)
    maps = heatmaps(codec, block)

    def argmax() -> None:
        maps.reshape(block * 17, -1).argmax(axis=1)

    ratio, ours, bare = compare("decode", lambda: codec.decode(maps), argmax, people // block)
    print(f"official decode {ours / block * 1e6:.1f} us a person, argmax alone {bare / block * 1e6:.1f} us")
    judge(f"official decode of {people} heatmap sets / argmax alone", ratio, 1.3)


def dark_decode(people: int = 60) -> None:
    """Against the published way, person by person and joint by joint, on equal answers."""
    codec = HeatmapCodec("dark", SIZE)
    maps = heatmaps(codec, people)
    ours, theirs = codec.decode(maps)[0] / 4, dark_loop(maps)
    difference = np.abs(ours - theirs).max()
    assert difference < 2e-3, f"the loop decodes otherwise, by {difference} cells"
    ratio, fast, slow = compare("dark", lambda: codec.decode(maps), lambda: dark_loop(maps), 9)
    print(f"dark decode {fast / people * 1e6:.0f} us a person, the loop {slow / people * 1e6:.0f} us")
    judge("per-person loop of the published method / dark decode", 1 / ratio, 10, at_most=False)


def dark_loop(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Written from its description (arXiv:1910.06278): the map blurred with 11 taps and zeros outside,
    rescaled to its old maximum, logarithm of what is above 1e-10, one Newton step from the maximum if that is
    two cells or more from the border. -> (P, K, 2) cells."""
    found = np.zeros((*maps.shape[:2], 2))
    for p, person in enumerate(maps):
        for k, heatmap in enumerate(person):
            y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
            found[p, k] = x, y
            padded = cv2.copyMakeBorder(heatmap, 5, 5, 5, 5, cv2.BORDER_CONSTANT, value=0)
            blurred = cv2.GaussianBlur(padded, (11, 11), 0)[5:-5, 5:-5]
            log = np.log(np.maximum(blurred * (heatmap.max() / blurred.max()), 1e-10))
            if not (1 < x < log.shape[1] - 2 and 1 < y < log.shape[0] - 2):
                continue
            dx = 0.5 * (log[y, x + 1] - log[y, x - 1])
            dy = 0.5 * (log[y + 1, x] - log[y - 1, x])
            dxx = 0.25 * (log[y, x + 2] - 2 * log[y, x] + log[y, x - 2])
            dyy = 0.25 * (log[y + 2, x] - 2 * log[y, x] + log[y - 2, x])
            dxy = 0.25 * (log[y + 1, x + 1] - log[y - 1, x + 1] - log[y + 1, x - 1] + log[y - 1, x - 1])
            if dxx * dyy - dxy**2 != 0:
                hessian = np.array([[dxx, dxy], [dxy, dyy]])
                found[p, k] -= np.linalg.inv(hessian) @ np.array([dx, dy])
    return found


# --- the network ----------------------------------------------------------------------------------------


def fitted_w32(root: Path) -> HRNet:
    """W32 with random weights and a head fitted to the drawn people: it has an AP to compare."""
    dots.SMALL = W32
    return dots.fitted_network(root, HeatmapCodec("official", SIZE))


def whole_evaluation(root: Path, network: HRNet, batch: int = 8, units_timed: int = 4) -> None:
    """People/s from file bytes to answers, as an actor works, against the bare forward of as many crops."""
    spec = CheckpointSpec(W32, HeatmapCodec("official", SIZE))
    settings = EvaluateSettings(batch_size=batch)
    unit = group_photos(read_evaluation_set(root, "val2017", None, settings, spec.skeleton), 2 * batch)[0]
    count = len(unit[1])
    for mode in ("float32", "bfloat16"):
        predictor = PosePredictor(network, spec, "cpu", mode)
        images = torch.randn(batch, 3, SIZE[1], SIZE[0]).to(memory_format=predictor._format)

        def bare(predictor: PosePredictor = predictor, images: torch.Tensor = images) -> None:
            with torch.inference_mode():
                for _ in range(2 * count // batch):  # plain and mirrored
                    predictor._network(images)

        threads = Threads(predictor)

        def whole(threads: Threads = threads) -> None:
            answer(unit, threads, settings)

        ratio, ours, alone = compare(mode, whole, bare, units_timed)
        print(f"{mode}: {count / ours:.2f} people/s with flip test, {count / alone:.2f} in the bare forward")
        judge(
            f"people/s of evaluation / bare forward, W32 {mode}",
            1 / ratio,
            0.9,
            at_most=False,
        )


def modes(root: Path, network: HRNet, rounds: int, measured: Path | None) -> None:
    """Each mode beside eager float32 at batch 1 and 16. Which are exact enough: by `measured`, a trained
    network on its own set, else by the AP on the people here."""
    known = read_spec(measured).modes["cpu"] if measured else {}
    spec = CheckpointSpec(W32, HeatmapCodec("official", SIZE))
    settings = EvaluateSettings(flip_test=False, batch_size=8)
    people = read_evaluation_set(root, "val2017", None, settings, spec.skeleton)
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (16, SIZE[1], SIZE[0], 3), dtype=np.uint8)
    eager = PosePredictor(network, spec, "cpu", "float32")
    exact = ap_of(people, eager, settings)
    print(
        f"AP of W32 with a fitted head on {len(people.asked)} drawn people, float32: {exact:.4f}",
        flush=True,
    )
    ratios: dict[int, dict[str, float]] = {1: {}, 16: {}}
    for mode in MODES[1:]:
        why = unusable(mode, "cpu")
        if why:
            print(f"{mode:<18} not measured: {why}")
            continue
        predictor = PosePredictor(network, spec, "cpu", mode)
        predictor.warm_up()
        difference = ap_of(people, predictor, settings) - exact
        decides = known[mode]["ap_difference"] if measured else difference
        told = []
        for batch in ratios:
            ratio, ours, theirs = compare(
                mode,
                lambda p=predictor, n=batch: p.heatmaps(crops[:n], flip_test=False),
                lambda n=batch: eager.heatmaps(crops[:n], flip_test=False),
                rounds if batch > 1 else 3 * rounds,
            )
            times = f"{1000 * ours / batch:.1f} of {1000 * theirs / batch:.1f} ms/crop"
            told.append(f"batch {batch}: {times}, {ratio:.2f}")
            if abs(decides) <= EXACT_ENOUGH:
                ratios[batch][mode] = ratio
        trained = f" (trained: {decides:+.4f})" if measured else ""
        print(f"{mode:<18} AP {difference:+.4f}{trained}; {'; '.join(told)}", flush=True)
    for batch, limit in ((1, 0.55), (16, 0.40)):
        best = min(ratios[batch], key=lambda mode: ratios[batch][mode], default="none")
        value = ratios[batch].get(best, np.inf)
        judge(f"W32, best exact-enough mode ({best}) / eager float32, batch {batch}", value, limit)


def ap_of(people: EvaluationSet, predictor: PosePredictor, settings: EvaluateSettings) -> float:
    found = _answers(people, predictor, settings)
    answers = found["keypoints"], found["scores"], people.asked, people.split.truth
    return score_poses(*answers, predictor.spec, settings)[0]["AP"]


if __name__ == "__main__":
    sys.exit(main())
