"""Preprocess: a COCO folder becomes shards of crops with their heatmaps, on Ray Data.

    read_split (both) -> plan_shards -> finished_shards are kept
    -> a Ray task for each pending one, of several CPUs where there are few: build_shard
    -> rejected.parquet, README, manifest.json

A shard is the unit of work and of recovery. Its bytes follow from the plan alone, so the dataset's digest
is the same for any number of tasks, after a kill, and for two writers at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from hrnet_core.errors import DataError, PoseError
from hrnet_core.locations import is_uri
from hrnet_core.skeleton import load_skeleton
from pipelines.cluster.session import cpus_each, quiet_ray_data, ray_session, require, room_for, selector
from pipelines.cluster.shared_paths import refuse_unshared
from pipelines.process.code_version import code_version
from pipelines.process.progress import Clock, ProgressLine
from pipelines.settings.config import DataSettings, RunConfig
from pipelines.shards.build import MOST_THREADS, build_shard
from pipelines.shards.manifest import Manifest, write_manifest
from pipelines.shards.plan import (
    BuiltShard,
    ShardWork,
    cannot_write,
    check_target,
    finished_shards,
    plan_shards,
)
from pipelines.shards.schema import MANIFEST
from pipelines.shards.writer import write_rejected
from pipelines.sources.doubts import doubts_of, refuse_misread, seen_of
from pipelines.sources.layout import locate
from pipelines.sources.records import Split, counted, refuse_rejected
from pipelines.sources.splits import read_split, split_names
from pipelines.storage.files import absolute, file_sizes, is_file, join, relative

LONG_ANNOTATIONS = 16_000_000
"""Bytes of an annotation file above which it is read while Ray starts."""
BETWEEN_TASKS = 150
"""People that a CPU could do while Ray goes from one task to the next (0.12 to 0.21 s)."""
Built = dict[tuple[str, int], BuiltShard]
"""By ShardWork.key."""


def preprocess(config: RunConfig) -> Manifest:
    """`data.root` (COCO or YOLO-pose) -> `data.shards`, both splits; what is finished there already is kept.

    DataError for a COCO folder that is not one, a target that holds another plan or foreign files, and,
    with data.strict, for any picture or person left out. Prints progress, and a table at the end.
    """
    manifest, log = run_preprocess(config)
    print(summary(manifest, log), flush=True)
    return manifest


def run_preprocess(config: RunConfig) -> tuple[Manifest, TaskLog]:
    """`preprocess` without the table, with what it is made of."""
    data = config.data
    with ThreadPoolExecutor(1) as reader, contextlib.ExitStack() as session:
        planned = reader.submit(_plan, data)
        if _takes_long(data):  # Ray starts meanwhile
            session.enter_context(ray_session(config.ray, quiet=True))
        splits, works, built = planned.result()
        pending = [work for work in works if work.key not in built]
        log = TaskLog(pending)
        if pending:
            session.enter_context(ray_session(config.ray, quiet=True))
            require(config.ray, 1, 1, 0, "preprocess")
            refuse_unshared([("--data.root", data.root)], [("--data.shards", data.shards)])
            labels = selector(config.ray)
            sizes = [len(work.people) for work in pending]
            cpus = cpus_each(sizes, MOST_THREADS, labels, BETWEEN_TASKS)
            log.begin(room_for(cpus, 0, labels), cpus)
            for task in _on_ray(pending, labels, cpus):
                built[task.key] = task.built
                log.done(task)
                if data.strict:
                    refuse_rejected(task.built.rejected)
    return finish(splits, works, built, data), log


def _takes_long(data: DataSettings) -> bool:
    """Whether reading the annotations takes about as long as Ray's start, and Ray is sure to be needed: else
    a mistake is better told, and a finished dataset recognised, without it. A bucket is not asked: it would
    be one request more that can fail, beside those of the reading."""
    far = is_uri(data.root) or is_uri(data.shards)
    if data.format != "coco" or far or is_file(join(absolute(data.shards), MANIFEST)):
        return False
    (size,) = file_sizes([locate(data.root, data.train_split)[0]])
    return size > LONG_ANNOTATIONS


def _plan(data: DataSettings) -> tuple[list[Split], list[ShardWork], Built]:
    """Both splits, their shards, and those that are there."""
    splits = [read_split(data.root, name, data) for name in split_names(data)]
    for split in splits:
        doubts = doubts_of(seen_of(split), load_skeleton(data.skeleton), data.coordinates_checked)
        refuse_misread(split.annotation_file, doubts)
    if data.strict:
        refuse_rejected([r for split in splits for r in split.rejected])
    works = [work for split in splits for work in plan_shards(split, data)]
    built = finished_shards(works, data.shards)
    if built:
        print(f"preprocess: {len(built)} of {len(works)} shards are there already", flush=True)
    if data.strict:
        refuse_rejected([r for found in built.values() for r in found.rejected])
    return splits, works, built


# ---------------------------------------------------------------------------------- on Ray


class Task(NamedTuple):
    """A shard that was made."""

    key: tuple[str, int]
    people: int
    """Of its work: those of photos that could not be used are among them."""
    built: BuiltShard
    start: float
    """s since the epoch, as `end`."""
    end: float
    worker: str
    """The process that made it."""
    peak_bytes: int
    """The most resident memory that the process ever had."""


def _on_ray(pending: Sequence[ShardWork], labels: dict[str, str], cpus: int) -> Iterator[Task]:
    """Each shard as its task ends, in any order. labels: of the nodes that may make them. cpus: of a task."""
    import ray.data

    # A row a shard and a block a row: a task each, however Ray would like to group them.
    blocks = [pa.table({"work": [pickle.dumps(work)]}) for work in pending]
    with quiet_ray_data():
        answers = ray.data.from_arrow(blocks).map_batches(
            _build_batch,  # type: ignore[arg-type]  # Ray's types have no fn_kwargs
            fn_kwargs={"threads": cpus},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=cpus,
            label_selector=labels,
        )
        batch: pa.Table
        # Read ahead, each answer would wait for the one after it.
        for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for answer in map(pickle.loads, batch["answer"].to_pylist()):
                if isinstance(answer, str):
                    raise DataError(answer)
                yield answer


def _build_batch(batch: pa.Table, threads: int) -> pa.Table:
    """The task: shards as pickled ShardWork in, a pickled Task of each out; or the words of its error."""
    cv2.setNumThreads(1)  # photos share a task's CPUs, not the rows of one
    answers = []
    for work in map(pickle.loads, batch["work"].to_pylist()):
        try:
            answer: Task | str = build_timed(work, threads)
        except PoseError as error:  # the user's to mend: told as one paragraph, not as a worker's traceback
            answer = str(error)
        answers.append(pickle.dumps(answer))
    return pa.table({"answer": answers})


def build_timed(work: ShardWork, threads: int = 1) -> Task:
    start = time.time()
    built = build_shard(work, threads)
    worker = f"{platform.node()}:{os.getpid()}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Task(work.key, len(work.people), built, start, time.time(), worker, peak)


class TaskLog:
    """What the tasks did so far, and the line that says how far it is.

    The time left follows from people per second of a task's work and the tasks at once, not from what is
    finished so far: when the first of sixteen shards is, the others are nearly so.
    """

    def __init__(self, pending: Sequence[ShardWork], clock: Clock = time.monotonic) -> None:
        self.shards, self._all_people = len(pending), sum(len(work.people) for work in pending)
        self.tasks: list[Task] = []
        self._line = ProgressLine("preprocess", len(pending), "shards", "people", clock=clock)
        self._slots = 1

    def begin(self, slots: int, cpus: int = 1) -> None:
        """slots: tasks that can run at once, of so many CPUs each."""
        self._slots = slots
        each = f", {cpus} CPUs each" if cpus > 1 else ""
        print(f"preprocess: {self._all_people:,} people in {self.shards} shards to make{each}", flush=True)

    def done(self, task: Task) -> None:
        self.tasks.append(task)
        self._line.add(task.people, self.seconds, self.seconds_left())

    @property
    def people(self) -> int:
        """People in the shards that were made."""
        return sum(task.people for task in self.tasks)

    @property
    def seconds(self) -> float:
        """From the first task's start to the last one's end; Ray's own start is not in it."""
        starts, ends = [task.start for task in self.tasks], [task.end for task in self.tasks]
        return max(ends, default=0) - min(starts, default=0)

    @property
    def at_once(self) -> int:
        """Most shards in work at one moment."""
        moments = sorted(moment for task in self.tasks for moment in ((task.start, 1), (task.end, -1)))
        return max(itertools.accumulate(step for _, step in moments), default=0)

    def seconds_left(self) -> float:
        """Until the last shard, from what the finished ones took; what is in work counts as not begun."""
        busy = sum(task.end - task.start for task in self.tasks)
        at_once = min(self._slots, max(1, self.shards - len(self.tasks)))
        return (self._all_people - self.people) * busy / max(1, self.people) / at_once


# ---------------------------------------------------------------------------------- the end


def finish(splits: Sequence[Split], works: Sequence[ShardWork], built: Built, data: DataSettings) -> Manifest:
    """rejected.parquet and the manifest of a dataset whose shards are all there."""
    rows = []
    sections = {}
    for split in splits:
        own = [work for work in works if work.split == split.name]
        shards = [shard for work in own for shard in built[work.key].shards]
        lost = [rejection for work in own for rejection in built[work.key].rejected]
        rejected = sorted([*split.rejected, *lost], key=lambda rejection: rejection.order)
        rows += [{"split": split.name, **asdict(rejection)} for rejection in rejected]
        people = sum(shard.people for shard in shards if shard.variant == 0)
        left_out, lost_people = Counter[str](), Counter[str]()
        for rejection in rejected:
            left_out[rejection.reason] += 1
            lost_people[rejection.reason] += rejection.people
        counts = {r: {"rows": left_out[r], "people": lost_people[r]} for r in sorted(left_out)}
        if people == 0:
            raise DataError(
                f"{split.annotation_file}: none of the pictures of split {split.name!r} can be used "
                f"({', '.join(counts)}). Check the pictures beside it: hrnet validate says what is wrong "
                f"with each, and the way out."
            )
        sections[split.name] = {
            "annotation_file": relative(split.annotation_file, data.root),
            "annotation_sha256": split.annotation_sha256,
            "plan": own[0].plan,
            "photos": sum(len(work.photos) for work in own) - len(lost),
            "people": people,
            "variants": own[0].variants,
            "rejected": counts,
            "repaired": dict(split.repaired),
            "shards": [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.path)],
        }
    packages = {"numpy": np.__version__, "opencv": cv2.__version__, "pyarrow": pa.__version__}
    code = {"hrnet": code_version(), **packages}
    fields = {"config": works[0].recipe.as_dict(), "splits": sections, "code": code}
    try:
        check_target(data.shards, works)
        sha256 = write_rejected(join(data.shards, "rejected.parquet"), rows)
        fields["rejected"] = {"rows": len(rows), "sha256": sha256}
        return write_manifest(data.shards, fields)
    except OSError as error:
        raise DataError(cannot_write(data.shards, error)) from None


def summary(manifest: Manifest, log: TaskLog) -> str:
    """The table at the end of a run."""
    lines = [f"{'split':<14}{'people':>9}{'photos':>9}{'views':>7}{'files':>8}{'MB':>9}  left out"]
    for name in manifest.splits:
        split = manifest.split(name)
        size = sum(shard["bytes"] for shard in split["shards"]) / 1e6
        reasons = ", ".join(f"{count['rows']} {reason}" for reason, count in split["rejected"].items())
        counts = f"{split['people']:>9,}{split['photos']:>9,}{split['variants']:>7}{len(split['shards']):>8}"
        lines.append(f"{name:<14}{counts}{size:>9.1f}  {reasons or 'none'}")
        without_area = split["repaired"].get("area_from_box", 0)
        if without_area >= split["people"]:
            lines.append("  the annotations have no areas: 0.53 x box instead, for training, not for an AP")
        if split["repaired"]:
            lines.append(f"  repaired: {counted(split['repaired'])} (hrnet validate says how)")
    if log.tasks:
        rate = log.people / max(log.seconds, 1e-9)
        workers, peak = {task.worker for task in log.tasks}, max(task.peak_bytes for task in log.tasks)
        lines.append(
            f"made {log.shards} shards in {log.seconds:.1f} s: {rate:,.0f} people/s, up to {log.at_once} "
            f"shards at once in {len(workers)} processes of at most {peak / 1e6:,.0f} MB"
        )
    lines += [f"digest {manifest.digest}", f"in {manifest.folder} (left out: rejected.parquet)"]
    return "\n".join(lines)
