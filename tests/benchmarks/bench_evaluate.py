"""How fast evaluation is: ratios against stated limits in the same run.

    python tests/benchmarks/bench_evaluate.py

Both sides of a ratio run in turn (A B A B ...) and the median of the pairs counts, so that other work on the
machine meets both alike. One thread; "whole" takes all cores. Exit code 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
import dots
from ratios import compare, exit_code, judge, with_memory_kept

from hrnet_core import memory
from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, read_spec, save_checkpoint
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from hrnet_core.modes import EXACT_ENOUGH, MODES, unusable
from hrnet_core.predictor import PosePredictor
from pipelines.evaluate import answer, group_photos
from pipelines.export import _answers
from pipelines.poses.actor import Actor, Outcome, Threads
from pipelines.poses.plan import make_plan
from pipelines.poses.protocol import score_poses
from pipelines.poses.units import rows_on_ray
from pipelines.poses.worker import Worker
from pipelines.settings.config import EvaluateSettings, PredictSettings, RaySettings
from pipelines.sources.evaluation_set import EvaluationSet, read_evaluation_set
from pipelines.sources.media import list_media
from pipelines.sources.photos import open_photo
from pipelines.sources.records import People, Photo

W32 = HRNetConfig()
SIZE = (192, 256)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["decode", "dark", "whole", "ahead", "modes"])
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
    if {"whole", "ahead", "modes"} & set(args.only):
        with tempfile.TemporaryDirectory() as folder:
            root = dots.write_coco(Path(folder), photos=args.photos)
            network = fitted_w32(root)
            if "whole" in args.only:
                whole_evaluation(root, network, Path(folder) / "checkpoint", args.rounds)
            if "ahead" in args.only:
                reading_ahead(Path(folder), args.rounds)
            if "modes" in args.only:
                modes(root, network, args.rounds, args.measured)
    return exit_code()


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

    ratio, ours, bare = compare(lambda: codec.decode(maps), argmax, people // block)
    print(f"official decode {ours / block * 1e6:.1f} us a person, argmax alone {bare / block * 1e6:.1f} us")
    judge(f"official decode of {people} heatmap sets / argmax alone", ratio, 1.3)


def dark_decode(people: int = 60) -> None:
    """Against the published way, person by person and joint by joint, on equal answers."""
    codec = HeatmapCodec("dark", SIZE)
    maps = heatmaps(codec, people)
    ours, theirs = codec.decode(maps)[0] / 4, dark_loop(maps)
    difference = np.abs(ours - theirs).max()
    assert difference < 2e-3, f"the loop decodes otherwise, by {difference} cells"
    ratio, fast, slow = compare(lambda: codec.decode(maps), lambda: dark_loop(maps), 9)
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


def whole_evaluation(root: Path, network: HRNet, folder: Path, rounds: int, batch: int = 4) -> None:
    """People/s from file bytes to answers, by Ray Data's actors on all cores, against the bare predictor in
    as many processes, on the same crops in the same batches."""
    import ray

    spec = CheckpointSpec(W32, HeatmapCodec("official", SIZE))
    save_checkpoint(folder, network, spec)
    settings = EvaluateSettings(batch_size=batch)
    people = read_evaluation_set(root, "val2017", None, settings, spec.skeleton)
    units = group_photos(people, 2 * batch)
    predictor = PosePredictor(network, spec, "cpu", "float32")
    crops = [crops_of(*unit, predictor) for unit in units]
    cores = len(os.sched_getaffinity(0))
    ray.init(
        address="local", num_cpus=cores, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    given, task = ray.put((network, spec)), ray.remote(predict_bare)
    for mode in ("bfloat16", "float32"):
        of_mode = settings.model_copy(update={"mode": mode})

        def whole(of_mode: EvaluateSettings = of_mode) -> tuple[float, float]:
            work, pending = functools.partial(timed_answer, settings=of_mode), dict(enumerate(units))
            rows = list(rows_on_ray(pending, work, folder, of_mode, RaySettings(), "evaluate"))
            spent = [json.loads(row["problems"])[0] for row in rows]
            times = [
                {"who": row["actor"], "start": row["start"], "end": row["end"], "cpu": cpu}
                for row, (_, cpu) in zip(rows, spent, strict=True)
            ]
            return speeds(len(people.asked), times)

        def bare(mode: str = mode) -> tuple[float, float]:
            # All at once: no process is to end while others have work left for it.
            shares = [crops[first::cores] for first in range(cores)]
            return speeds(len(people.asked), ray.get([task.remote(given, mode, s, batch) for s in shares]))

        pairs = np.array([(bare(), whole()) for _ in range(rounds)])  # (rounds, side, clock and CPU)
        (alone, alone_cpu), (ours, ours_cpu) = np.median(pairs, axis=0)
        ratio, cpu_ratio = np.median(pairs[:, 1] / pairs[:, 0], axis=0)
        print(
            f"{mode}, {cores} cores: {ours:.2f} people/s with flip test, {alone:.2f} by the bare predictor; "
            f"{ours_cpu:.2f} and {alone_cpu:.2f} in a CPU second; load {os.getloadavg()[0]:.1f}"
        )
        judge(f"people/s of evaluation / bare predictor, all cores, W32 {mode}", ratio, 0.9, at_most=False)
        judge(f"the same in a CPU second, W32 {mode}", cpu_ratio, 0.9, at_most=False)
    ray.shutdown()


def crops_of(photos: Sequence[Photo], people: People, predictor: PosePredictor) -> NDArray[np.uint8]:
    boxes = [people.bbox_xywh[rows] for rows in people.by_image().values()]
    opened = [open_photo(photo, 10**8)[0] for photo in photos]
    return np.concatenate([one.crops for one in predictor.prepare(opened, boxes)])


def timed_answer(unit: Any, threads: Threads, settings: EvaluateSettings) -> Outcome:
    """`answer`, and the CPU seconds of its process, before and after, in the place of problems."""
    before = time.process_time()
    outcome = answer(unit, threads, settings)
    return replace(outcome, problems=(("cpu", [before, time.process_time()]),))


def predict_bare(given: Any, mode: str, crops: list[NDArray[np.uint8]], batch: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    predictor = PosePredictor(*given, "cpu", mode)
    start, before = time.monotonic(), time.process_time()
    for of_unit in crops:
        predictor.predict_crops(of_unit, True, batch)
    cpu = [before, time.process_time()]
    return {"who": os.getpid(), "start": start, "end": time.monotonic(), "cpu": cpu}


def speeds(people: int, spans: list[dict[str, Any]]) -> tuple[float, float]:
    """People in a second by the clock, and in one of the CPUs of all processes."""
    clock = max(span["end"] for span in spans) - min(span["start"] for span in spans)
    own = {span["who"]: [one["cpu"] for one in spans if one["who"] == span["who"]] for span in spans}
    return people / clock, people / sum(np.max(cpu) - np.min(cpu) for cpu in own.values())


# --- reading ahead --------------------------------------------------------------------------------------


def reading_ahead(folder: Path, rounds: int) -> None:
    """How long the network of an actor waits for files: with two units at once, as an actor works, and one
    after the other. Large pictures with one person each, and a video, on one CPU. The network is a stand-in
    that sleeps, as if it had a core or a GPU of its own, twice as long as a unit takes to be read: then only
    the first unit's reading cannot be hidden."""
    spec = CheckpointSpec(W32, HeatmapCodec("official", SIZE))
    settings = PredictSettings(mode="float32", batch_size=2)
    pass_s, asleep = 0.0, list[float]()

    def stand_in(crops: NDArray[np.uint8], *_: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        start = time.perf_counter()
        time.sleep(pass_s)
        asleep.append(time.perf_counter() - start)
        return np.zeros((len(crops), 17, 2), np.float32), np.zeros((len(crops), 17), np.float32)

    for name, source in (("12 Mpx JPEGs", large_jpegs(folder)), ("4K video", large_video(folder))):
        units = make_plan(list_media([source])[0], None, None, settings, spec).units
        rows = [{"unit": np.array([0]), "work": [pickle.dumps(unit)]} for unit in units]
        actor = Actor(lambda: (HRNet(W32), spec), Worker(settings), settings)
        actor.threads.predictor.predict_crops = stand_in  # type: ignore[method-assign]

        def waits(at_once: int, actor: Actor = actor, rows: list[Any] = rows) -> float:
            asleep.clear()
            start = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(actor, rows))
            return time.perf_counter() - start - sum(asleep)

        pass_s = 0.0
        pass_s = 2 * waits(1) / len(rows)
        waited: dict[int, list[float]] = {1: [], 2: []}
        for at_once in [1, 2] * rounds:
            waited[at_once].append(waits(at_once))
        one, two = (statistics.median(seconds) for seconds in waited.values())
        print(
            f"{name}: in {len(rows)} units of {pass_s:.1f} s the network waits {two:.2f} s, {one:.2f} s one "
            f"after the other; load {os.getloadavg()[0]:.1f}"
        )
        judge(f"seconds that the network waits for {name} / one unit after the other", two / one, 0.4)


def large_jpegs(folder: Path, count: int = 24) -> str:
    (folder / "large").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    picture = cv2.resize(noise, (4000, 3000), interpolation=cv2.INTER_CUBIC)
    for number in range(count):
        moved = np.roll(picture, 50 * number, axis=1)
        cv2.imwrite(str(folder / "large" / f"{number}.jpg"), moved, [cv2.IMWRITE_JPEG_QUALITY, 92])
    return str(folder / "large")


def large_video(folder: Path, frames: int = 32) -> str:
    file, size = str(folder / "clip.mp4"), (3840, 2160)
    picture = cv2.resize(cv2.imread(str(folder / "large" / "0.jpg")), size)
    writer = cv2.VideoWriter(file, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 25.0, size)
    for number in range(frames):
        writer.write(np.roll(picture, 20 * number, axis=1))
    writer.release()
    return file


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
    with_memory_kept(memory.PASSES)
    sys.exit(main())
