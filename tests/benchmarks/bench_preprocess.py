"""People per second of `hrnet preprocess` against what no such program could avoid, measured in turns.

    python tests/benchmarks/bench_preprocess.py                                  10,000 to 60,000 people
    python tests/benchmarks/bench_preprocess.py --people 1000 3000 --shard 256   a quick look
    python tests/benchmarks/bench_preprocess.py --steps                          where the time goes

The limit is two plain processes that do nothing but the library calls: read and cv2.imdecode a photo,
cv2.warpAffine and cv2.imencode each person, fill the Gaussians, write the Parquet table. Matrices, places
and all other columns are given to them ready made; they hash, check and tell nothing. Their first shard is
compared with ours: the same pictures and heatmaps, byte for byte.

Both sides run on the same two cores, in turns (ours, limit, ours, limit, ...), so that other work on the
machine meets both. What counts is the slope between the first two numbers of people: start-up is not in
it. A third number shows whether the cost is linear: its slope must be the same.
Photographs are drawn (`hrnet draw`), or those of --coco; they are repeated under new ids up to the number
of people asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train2017", "val2017")
CORES = 2
GOAL = 0.80
NOT_GIVEN = ("image", "heatmaps")


def main() -> None:
    arguments = read_arguments()
    if arguments.limit:
        return write_like_preprocess(*arguments.limit)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    work = Path(arguments.work or tempfile.mkdtemp(prefix="hrnet-bench-"))
    try:
        source = Path(arguments.coco) if arguments.coco else drawn(work / "drawn", arguments.photos)
        if arguments.steps:
            return steps(source, work, arguments)
        compare(source, work, arguments)
    finally:
        if not arguments.work:
            shutil.rmtree(work, ignore_errors=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, nargs="+", default=(10_000, 30_000, 60_000))
    parser.add_argument("--shard", type=int, default=2048, help="people in a shard")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side at each size")
    parser.add_argument("--photos", type=int, default=2000, help="photographs to draw")
    parser.add_argument("--coco", help="a COCO root to repeat instead of drawing")
    parser.add_argument("--work", help="folder for all files, kept (drawn photographs are used again)")
    parser.add_argument("--steps", action="store_true", help="only: where the time of one process goes")
    parser.add_argument("--limit", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- people -------------------------------------------------------------------------------------------


def drawn(folder: Path, photos: int) -> Path:
    if not (folder / "annotations").is_dir():
        run_hrnet("draw", str(folder), "--images", str(photos))
    return folder


def repeated(source: Path, target: Path, people: int) -> Path:
    """`people` of a COCO set's training people under new ids, whole photos (hard links), and a few of its
    validation photos. Crowds and people without keypoints come along, as they would."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "annotations").mkdir(parents=True)
    for split, wanted in zip(SPLITS, (people, 10), strict=True):
        name = f"annotations/person_keypoints_{split}.json"
        data = json.loads((source / name).read_text())
        of_photo = defaultdict(list)
        for annotation in data["annotations"]:
            of_photo[annotation["image_id"]].append(annotation)
        (target / split).mkdir()
        photos, annotations, found, copy = [], [], 0, 0
        while found < wanted:
            for photo in data["images"]:
                own = of_photo[photo["id"]]
                usable = sum(a["num_keypoints"] > 0 and not a["iscrowd"] for a in own)
                if not usable or found >= wanted:
                    continue
                found += usable
                file = f"{copy}-{photo['file_name']}"
                link(source / split / photo["file_name"], target / split / file)
                image_id = copy * 10**9 + photo["id"]
                photos.append({**photo, "id": image_id, "file_name": file})
                annotations += [{**a, "id": copy * 10**12 + a["id"], "image_id": image_id} for a in own]
            copy += 1
        text = json.dumps({**data, "images": photos, "annotations": annotations})
        (target / name).write_text(text)
    return target


def link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # another file system
        shutil.copy(file, name)


# --- ours ---------------------------------------------------------------------------------------------


def run_hrnet(*arguments: str) -> tuple[float, float]:
    """Seconds of one command, process start and end included, and CPU seconds of it and all it started."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    with tempfile.TemporaryFile("w+") as told:
        seconds, cpu, code = measured([subprocess.Popen(command, env=environment, stdout=told, stderr=told)])
        if code:
            told.seek(0)
            sys.exit(f"hrnet {' '.join(arguments)} ended with {code}:\n{told.read()}")
    return seconds, cpu


def measured(processes: list[subprocess.Popen[Any]]) -> tuple[float, float, int]:
    """Wall and CPU seconds of processes and all that they start, as long as it lives (looked at five times
    a second: what ends in between is counted up to the last look), and the worst exit code."""
    begun = time.perf_counter()
    cpu: dict[tuple[int, float], float] = {}
    while any(process.poll() is None for process in processes):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(process.pid)
                for one in (root, *root.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        times = one.cpu_times()
                        cpu[one.pid, one.create_time()] = times.user + times.system
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(0.2)
    seconds = time.perf_counter() - begun
    return seconds, sum(cpu.values()), max(process.wait() for process in processes)


def ours(coco: Path, shards: Path, shard: int) -> tuple[float, float]:
    shutil.rmtree(shards, ignore_errors=True)
    return run_hrnet(
        "preprocess",
        "w32_256x192",
        *("--data.root", str(coco), "--data.shards", str(shards)),
        *("--data.context", "1.0", "--data.variants", "1"),
        *("--data.people-per-shard", str(shard), "--ray.num-cpus", str(CORES)),
    )


# --- the limit ----------------------------------------------------------------------------------------


def plans(coco: Path, shards: Path, folder: Path) -> list[Path]:
    """For each process a file of what it needs, taken from the shards that preprocess wrote."""
    names = {}
    for split in SPLITS:
        data = json.loads((coco / f"annotations/person_keypoints_{split}.json").read_text())
        names |= {(split, i["id"]): str(coco / split / i["file_name"]) for i in data["images"]}
    parts: list[list[Any]] = [[] for _ in range(CORES)]
    for number, file in enumerate(sorted((shards / "data").iterdir())):
        with pq.ParquetFile(file) as parquet:
            columns = [n for n in parquet.schema_arrow.names if n not in NOT_GIVEN]
            groups = [parquet.read_row_group(g, columns) for g in range(parquet.num_row_groups)]
            schema = parquet.schema_arrow
        split = file.name.partition("-")[0]
        photos = [[names[split, i] for i in group["image_id"].to_pylist()] for group in groups]
        parts[number % CORES].append((file.name, schema, groups, photos))
    files = [folder / f"plan-{i}.pickle" for i in range(CORES)]
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(pickle.dumps(part))
    return files


def limit(files: list[Path], output: Path) -> tuple[float, float]:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    command = [sys.executable, __file__, "--limit"]
    seconds, cpu, code = measured([subprocess.Popen([*command, str(file), str(output)]) for file in files])
    if code:
        sys.exit("the limit's processes failed")
    return seconds, cpu


def write_like_preprocess(plan: str, output: str) -> None:
    """One process of the limit."""
    cv2.setNumThreads(1)
    for name, schema, groups, photos in pickle.loads(Path(plan).read_bytes()):
        own = json.loads(schema.metadata[b"hrnet"])
        fill = Gaussians(own["codec"]["sigma"], own["heatmaps"]["shape"])
        scalars = [
            f.name for f in schema if not pa.types.is_nested(f.type) and not pa.types.is_binary(f.type)
        ]
        with pq.ParquetWriter(
            f"{output}/{name}",
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=scalars,
            write_page_checksum=True,
        ) as writer:
            path, image = "", None
            for group, files in zip(groups, photos, strict=True):
                pictures = []
                matrices = group["image_to_crop"].combine_chunks().flatten().to_numpy().reshape(-1, 2, 3)
                for file, matrix in zip(files, matrices, strict=True):
                    if file != path:
                        path, image = file, decoded(file)
                    pictures.append(encoded(warped(image, matrix)))
                heatmaps = fill(group)
                write(writer, schema, group, pictures, heatmaps)


def decoded(file: str) -> Any:
    with open(file, "rb") as stream:
        data = np.frombuffer(stream.read(), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


def warped(image: Any, matrix: Any) -> Any:
    return cv2.warpAffine(image, matrix, (192, 256), flags=cv2.INTER_LINEAR)


def encoded(crop: Any) -> bytes:
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    return bytes(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 95, *sampling])[1])


class Gaussians:
    """The official codec's heatmaps, as plainly as can be: zeros, and one ready window pasted for each
    keypoint."""

    def __init__(self, sigma: float, shape: list[int]) -> None:
        self.shape, self.reach = shape, int(3 * sigma)
        axis = np.exp(np.arange(-self.reach, self.reach + 1) ** 2 * (-0.5 / sigma**2)).astype(np.float32)
        self.window = (axis[:, None] * axis).astype(np.float16)

    def __call__(self, group: pa.Table) -> Any:
        people = group.num_rows
        count, height, width = self.shape
        matrices = group["image_to_crop"].combine_chunks().flatten().to_numpy().reshape(-1, 2, 3)
        keypoints = group["keypoints"].combine_chunks().flatten().to_numpy().reshape(people, count, 3)
        weights = group["weights"].combine_chunks().flatten().to_numpy().reshape(people, count)
        crop = keypoints[..., :2] @ matrices[..., :2].transpose(0, 2, 1) + matrices[:, None, :, 2]
        cells = np.trunc(crop.astype(np.float32) / 4.0 + 0.5).astype(int)
        heatmaps = np.zeros((people, count, height, width), np.float16)
        for person, keypoint in np.argwhere(weights > 0).tolist():
            x, y = cells[person, keypoint].tolist()
            left, top = x - self.reach, y - self.reach
            right, bottom = x + self.reach + 1, y + self.reach + 1
            part = self.window[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
            if right > 0 and bottom > 0:
                place = heatmaps[person, keypoint, max(0, top) : bottom, max(0, left) : right]
                place[:] = part[: place.shape[0], : place.shape[1]]
        return heatmaps


def write(writer: Any, schema: pa.Schema, group: pa.Table, pictures: list[bytes], heatmaps: Any) -> None:
    names = pa.array([""] * len(pictures), pa.string())
    offsets = np.arange(len(heatmaps) + 1, dtype=np.int32) * np.int32(heatmaps[0].nbytes)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(heatmaps)]
    made = {
        "image": pa.StructArray.from_arrays([pa.array(pictures, pa.binary()), names], ["bytes", "path"]),
        "heatmaps": pa.Array.from_buffers(pa.binary(), len(heatmaps), buffers),
    }
    columns = [made[name] if name in made else group[name].combine_chunks() for name in schema.names]
    writer.write_table(pa.table(columns, schema=schema), row_group_size=group.num_rows)


def check_the_same(shards: Path, output: Path) -> None:
    """The limit's first shard has the pictures and heatmaps of ours."""
    name = min(file.name for file in output.iterdir())
    for column in ("image.bytes", "heatmaps"):
        mine, theirs = (
            pq.read_table(folder / name, columns=[column]).column(0).combine_chunks()
            for folder in (shards / "data", output)
        )
        if not mine.equals(theirs):
            sys.exit(f"{name}: the limit's {column} are not ours, so the comparison means nothing")


# --- the comparison -----------------------------------------------------------------------------------


def compare(source: Path, work: Path, arguments: argparse.Namespace) -> None:
    sets = {}
    for people in arguments.people:
        coco = repeated(source, work / f"coco-{people}", people)
        shards = work / "shards"
        ours(coco, shards, arguments.shard)
        folder = work / f"plans-{people}"
        folder.mkdir(exist_ok=True)
        files = plans(coco, shards, folder)
        limit(files, work / "limit")
        check_the_same(shards, work / "limit")
        sets[people] = coco, files
    times: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for turn in range(arguments.rounds):
        for people, (coco, files) in sets.items():
            for side in ("ours", "limit"):
                load = os.getloadavg()[0]
                if side == "ours":
                    seconds, cpu = ours(coco, work / "shards", arguments.shard)
                else:
                    seconds, cpu = limit(files, work / "limit")
                times[side, people].append((seconds, cpu))
                told = f"{people:>8,} people{seconds:>8.1f} s{cpu:>8.1f} s of CPU  load {load:.1f}"
                print(f"turn {turn + 1}  {side:<6}{told}", flush=True)
    report(times, arguments.people)


def report(times: dict[tuple[str, int], list[tuple[float, float]]], people: list[int]) -> None:
    """Medians of the turns, and the slope between each size and the next."""
    medians = {key: np.median(turns, axis=0) for key, turns in times.items()}
    for number, (few, many) in enumerate(pairwise(people)):
        slopes = {s: (medians[s, many] - medians[s, few]) / (many - few) for s in ("ours", "limit")}
        print(f"from {few:,} to {many:,} people:")
        for side, (wall, cpu) in slopes.items():
            print(f"  {side:<6}{1 / wall:>8,.0f} people/s, {cpu * 1e6:,.0f} us of CPU each")
        wall, cpu = slopes["limit"] / slopes["ours"]
        goal = f" (goal {GOAL:.2f})" if number == 0 else ""
        print(f"  {wall:.2f} of the limit{goal}; by CPU time {cpu:.2f}")
    for side in ("ours", "limit"):
        walls = [medians[side, size][0] for size in people]
        per, start = np.polyfit(people, walls, 1)
        told = f"{side:<6}{start:.1f} s to start and end"
        if len(people) > 2:  # a line through two is never off
            off = np.abs(walls - (per * np.array(people) + start)) / walls
            told += f"; a line through all is {off.max():.1%} off at most"
        print(told)


# --- where it goes ------------------------------------------------------------------------------------


def steps(source: Path, work: Path, arguments: argparse.Namespace) -> None:
    """CPU time a person of one process, ours and the limit's, step by step, on two shards."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from hrnet_core import images
    from hrnet_core.heatmaps import HeatmapCodec
    from hrnet_core.skeleton import COCO17
    from pipelines import preprocess
    from pipelines.settings.config import DataSettings
    from pipelines.shards import build, writer
    from pipelines.shards.plan import finished_shards, plan_shards
    from pipelines.sources.coco import read_coco
    from pipelines.storage import files as storage

    cv2.setNumThreads(1)
    coco = repeated(source, work / "coco-steps", 2 * arguments.shard)
    settings = {"root": str(coco), "shards": str(work / "shards"), "people_per_shard": arguments.shard}
    shutil.rmtree(work / "shards", ignore_errors=True)
    data = DataSettings(**settings)
    splits = [read_coco(data.root, name, COCO17) for name in SPLITS]
    works = [shard for split in splits for shard in plan_shards(split, data)]
    finished_shards(works, data.shards)
    build.build_shard(works[-1])  # what the first shard of a process costs once (imports) is no step
    watch = Stopwatch()
    for owner, name, step in (
        (build, "check_photo", "read the photo"),
        (images, "read_header", "judge its header and end"),
        (images, "_is_complete", "judge its header and end"),
        (images, "_decode", "imdecode"),
        (build, "crop_people", "warpAffine"),
        (build, "_encode", "imencode"),
        (build, "_placed", "boxes, matrices, places"),
        (build, "_columns", "boxes, matrices, places"),
        (HeatmapCodec, "factors", "Gaussians"),
        (build, "float16_heatmaps", "Gaussians"),
        (writer.ShardWriter, "write", "Parquet"),
        (writer.ShardWriter, "finish", "hash and publish the shard"),
        (storage, "put_in_place", "hash and publish the shard"),
        (build, "build_shard", "the rest"),
    ):
        watch.watch(owner, name, step)
    figures = {shard.key: build.build_shard(shard) for shard in works}
    mine = watch.stop()
    preprocess.finish(splits, works, figures, data)
    people = sum(len(shard.people) for shard in works)

    (work / "limit").mkdir(exist_ok=True)
    files = plans(coco, work / "shards", work)
    module = sys.modules[__name__]
    for owner, name, step in (
        (module, "decoded", "imdecode"),
        (module, "warped", "warpAffine"),
        (module, "encoded", "imencode"),
        (Gaussians, "__call__", "Gaussians"),
        (module, "write", "Parquet"),
        (module, "write_like_preprocess", "the rest"),
    ):
        watch.watch(owner, name, step)
    for file in files:
        module.write_like_preprocess(str(file), str(work / "limit"))
    theirs = watch.stop()
    check_the_same(work / "shards", work / "limit")

    print(f"{people:,} people, us of CPU each{'ours':>18}{'limit':>8}")
    for step in sorted({*mine, *theirs}, key=lambda step: -mine.get(step, 0)):
        print(
            f"  {step:<38}{mine.get(step, 0) / people * 1e6:>8.0f}{theirs.get(step, 0) / people * 1e6:>8.0f}"
        )
    totals = [sum(times.values()) / people * 1e6 for times in (mine, theirs)]
    print(f"  {'all':<38}{totals[0]:>8.0f}{totals[1]:>8.0f}   {totals[1] / totals[0]:.2f} of the limit")


class Stopwatch:
    """CPU seconds in watched functions, each without the watched functions that it calls."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        self._originals: list[tuple[Any, str, Callable[..., Any]]] = []

    def watch(self, owner: Any, name: str, step: str) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, original))

        def watched(*args: Any, **keywords: Any) -> Any:
            self._inner.append(0.0)
            begun = time.process_time()
            try:
                return original(*args, **keywords)
            finally:
                seconds = time.process_time() - begun
                self._seconds[step] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        setattr(owner, name, watched)

    def stop(self) -> dict[str, float]:
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        self._originals.clear()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


if __name__ == "__main__":
    main()
