"""Preprocess: a COCO folder becomes shards of crops with their heatmaps, on Ray Data.

    read_split (both) -> plan_shards -> finished_shards are kept
    -> a Ray task for each pending one: build_shard -> rejected.parquet, README, manifest.json

A shard is the unit of work and of recovery. Its bytes follow from the plan alone, so the dataset's digest
is the same for any number of tasks, after a kill, and for two writers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from hrnet_core.errors import DataError, PoseError
from hrnet_core.locations import is_uri
from pipelines.cluster import quiet_ray_data, ray_session, require
from pipelines.code_version import code_version
from pipelines.config import DataSettings, RunConfig
from pipelines.progress import Clock, ProgressLine
from pipelines.shards.build import Figures, build_shard
from pipelines.shards.manifest import Manifest, write_manifest
from pipelines.shards.plan import (
    ShardWork,
    cannot_write,
    check_target,
    finished_shards,
    plan_shards,
)
from pipelines.shards.schema import MANIFEST
from pipelines.shards.writer import write_rejected
from pipelines.sources.layout import annotations_of
from pipelines.sources.records import Rejection, Split, refuse_rejected
from pipelines.sources.splits import read_split, split_names
from pipelines.storage import absolute, file_sizes, is_file, join, relative

LONG_ANNOTATIONS = 16_000_000
"""Bytes of an annotation file above which it is read while Ray starts."""


@dataclass(frozen=True)
class PreprocessRun:
    """What a run of preprocess did."""

    manifest: Manifest
    built: int
    """Shards that this run made."""
    reused: int
    """Shards that were there whole."""
    people: int
    """People in the shards that this run made."""
    seconds: float
    """From the first task's start to the last one's end; Ray's own start is not in it."""
    at_once: int
    """Most shards in work at the same moment."""
    workers: int
    """Processes that made them."""
    peak_bytes: int = 0
    """Resident memory of the largest of them, at its largest."""


def preprocess(config: RunConfig) -> Manifest:
    """`data.root` (COCO or YOLO-pose) -> `data.shards`, both splits; what is finished there already is kept.

    DataError for a COCO folder that is not one, a target that holds another plan or foreign files, and,
    with data.strict, for any picture or person left out. Prints progress, and a table at the end.
    """
    report = run_preprocess(config)
    print(summary(report), flush=True)
    return report.manifest


def run_preprocess(config: RunConfig) -> PreprocessRun:
    """`preprocess` with the figures of the run, without the table."""
    data = config.data
    with ThreadPoolExecutor(1) as reader, contextlib.ExitStack() as session:
        planned = reader.submit(_plan, data)
        if _takes_long(data):  # Ray starts meanwhile
            session.enter_context(ray_session(config.ray))
        splits, works, figures = planned.result()
        pending = [work for work in works if work.key not in figures]
        log = TaskLog(pending)
        if pending:
            session.enter_context(ray_session(config.ray))
            require(config.ray, 1, 1, 0, "preprocess")
            log.begin(_slots())
            for key, built in _on_ray(pending):
                figures[key] = built
                log.done(key, built)
                if data.strict:
                    refuse_rejected([Rejection(**row) for row in built["rejected"]])
    manifest = finish(splits, works, figures, data)
    at_once, workers = log.overlap()
    return PreprocessRun(
        manifest,
        built=len(pending),
        reused=len(works) - len(pending),
        people=log.people,
        seconds=log.seconds,
        at_once=at_once,
        workers=workers,
        peak_bytes=log.peak_bytes,
    )


def _takes_long(data: DataSettings) -> bool:
    """Whether reading the annotations takes about as long as Ray's start, and Ray is sure to be needed: else
    a mistake is better told, and a finished dataset recognised, without it. A bucket is not asked: it would
    be one request more that can fail, beside those of the reading."""
    if data.format != "coco" or is_uri(data.root) or is_uri(data.shards):
        return False
    if is_file(join(absolute(data.shards), MANIFEST)):
        return False
    (size,) = file_sizes([annotations_of(data.root, data.train_split)])
    return size > LONG_ANNOTATIONS


def _plan(data: DataSettings) -> tuple[list[Split], list[ShardWork], dict[tuple[str, int], Figures]]:
    """Both splits, their shards, and the figures of those that are there."""
    splits = [read_split(data.root, name, data) for name in split_names(data)]
    if data.strict:
        refuse_rejected([r for split in splits for r in split.rejected])
    works = [work for split in splits for work in plan_shards(split, data)]
    figures = finished_shards(works, data.shards)
    if figures:
        print(f"preprocess: {len(figures)} of {len(works)} shards are there already", flush=True)
    if data.strict:
        refuse_rejected([Rejection(**row) for found in figures.values() for row in found["rejected"]])
    return splits, works, figures


# ---------------------------------------------------------------------------------- on Ray


def _on_ray(pending: Sequence[ShardWork]) -> Iterator[tuple[tuple[str, int], Figures]]:
    """(key, figures) of each shard as its task ends, in any order."""
    import ray.data

    # A row a shard and a block a row: a task each, however Ray would like to group them.
    blocks = [pa.table({"work": [pickle.dumps(work)]}) for work in pending]
    with quiet_ray_data():
        answers = ray.data.from_arrow(blocks).map_batches(
            _build_batch, batch_size=1, batch_format="pyarrow", num_cpus=1
        )
        # Read ahead, each answer would wait for the one after it.
        for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for text in batch["answer"].to_pylist():
                answer = json.loads(text)
                if "error" in answer:
                    raise DataError(answer["error"])
                yield tuple(answer.pop("key")), answer


def _build_batch(batch: pa.Table) -> pa.Table:
    """The task: shards as pickled ShardWork in, their figures as JSON out."""
    cv2.setNumThreads(1)  # a task has one CPU
    answers = []
    for pickled in batch["work"].to_pylist():
        start = time.time()
        work = pickle.loads(pickled)
        try:
            answer = {"key": work.key, **build_shard(work)}
        except PoseError as error:  # the user's to mend: told as one paragraph, not as a worker's traceback
            answer = {"error": str(error)}
        worker = f"{platform.node()}:{os.getpid()}"
        figures = {"start": start, "end": time.time(), "worker": worker, "peak_bytes": _peak_bytes()}
        answers.append(json.dumps({**answer, **figures}))
    return pa.table({"answer": answers})


def _slots() -> int:
    """Tasks that can run at once: the CPUs of the Ray that is there."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else 1


def _peak_bytes() -> int:
    """The most resident memory that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class TaskLog:
    """What the tasks did so far, and the line that says how far it is.

    The time left follows from people per second of a task's work and the tasks at once, not from what is
    finished so far: when the first of sixteen shards is, the others are nearly so.
    """

    def __init__(self, pending: Sequence[ShardWork], clock: Clock = time.monotonic) -> None:
        self._people = {work.key: len(work.people) for work in pending}
        self._answers: list[Figures] = []
        self._line = ProgressLine("preprocess", len(pending), "shards", "people", clock=clock)
        self._slots = 1
        self.people = 0

    def begin(self, slots: int) -> None:
        self._slots = max(1, slots)
        people, shards = sum(self._people.values()), len(self._people)
        print(f"preprocess: {people:,} people in {shards} shards to make", flush=True)

    @property
    def seconds(self) -> float:
        starts, ends = ([answer[key] for answer in self._answers] for key in ("start", "end"))
        return max(ends, default=0) - min(starts, default=0)

    @property
    def peak_bytes(self) -> int:
        return max((answer["peak_bytes"] for answer in self._answers), default=0)

    def done(self, key: tuple[str, int], answer: Figures) -> None:
        self._answers.append(answer)
        self.people += self._people[key]
        self._line.add(self._people[key], self.seconds, self.seconds_left())

    def seconds_left(self) -> float:
        """Until the last shard, from what the finished ones took; what is in work counts as not begun."""
        left = sum(self._people.values()) - self.people
        busy = sum(answer["end"] - answer["start"] for answer in self._answers)
        at_once = min(self._slots, max(1, len(self._people) - len(self._answers)))
        return left * busy / max(1, self.people) / at_once

    def overlap(self) -> tuple[int, int]:
        """Most shards in work at one moment, and the number of processes that worked."""
        moments = sorted(m for a in self._answers for m in ((a["start"], 1), (a["end"], -1)))
        at_once = max(np.cumsum([step for _, step in moments], dtype=int).tolist(), default=0)
        return at_once, len({a["worker"] for a in self._answers})


# ---------------------------------------------------------------------------------- the end


def finish(
    splits: Sequence[Split],
    works: Sequence[ShardWork],
    figures: Mapping[tuple[str, int], Figures],
    data: DataSettings,
) -> Manifest:
    """rejected.parquet and the manifest of a dataset whose shards are all there."""
    rows: list[dict[str, Any]] = []
    sections = {}
    for split in splits:
        own = [work for work in works if work.split == split.name]
        rejected = [asdict(r) for r in split.rejected]
        rejected += [row for work in own for row in figures[work.key]["rejected"]]
        rejected.sort(key=lambda row: Rejection(**row).order)
        rows += [{"split": split.name, **row} for row in rejected]
        shards = [entry for work in own for entry in figures[work.key]["shards"]]
        shards.sort(key=lambda entry: entry["path"])
        people = sum(entry["people"] for entry in shards if entry["variant"] == 0)
        counts = _by_reason(rejected)
        if people == 0:
            raise DataError(
                f"{split.annotation_file}: none of the pictures of split {split.name!r} can be used "
                f"({', '.join(counts)}). Check the pictures beside it."
            )
        lost = sum(1 for work in own for row in figures[work.key]["rejected"])
        sections[split.name] = {
            "annotation_file": relative(split.annotation_file, data.root),
            "annotation_sha256": split.annotation_sha256,
            "plan": own[0].plan,
            "photos": sum(len(work.photos) for work in own) - lost,
            "people": people,
            "variants": own[0].variants,
            "rejected": counts,
            "repaired": dict(split.repaired),
            "shards": shards,
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


def _by_reason(rejected: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row in sorted(rejected, key=lambda row: row["reason"]):
        count = counts.setdefault(row["reason"], {"rows": 0, "people": 0})
        count["rows"] += 1
        count["people"] += row["people"]
    return counts


def summary(report: PreprocessRun) -> str:
    """The table at the end of a run."""
    manifest = report.manifest
    lines = [f"{'split':<14}{'people':>9}{'photos':>9}{'views':>7}{'shards':>8}{'MB':>9}  left out"]
    for name in manifest.splits:
        split = manifest.split(name)
        size = sum(shard["bytes"] for shard in split["shards"]) / 1e6
        reasons = ", ".join(f"{count['rows']} {reason}" for reason, count in split["rejected"].items())
        counts = f"{split['people']:>9,}{split['photos']:>9,}{split['variants']:>7}{len(split['shards']):>8}"
        lines.append(f"{name:<14}{counts}{size:>9.1f}  {reasons or 'none'}")
        if "area_from_box" in split["repaired"]:
            lines.append("  the annotations have no areas: 0.53 x box instead, for training, not for an AP")
    if report.built:
        rate = report.people / max(report.seconds, 1e-9)
        lines.append(
            f"made {report.built} shards in {report.seconds:.1f} s: {rate:,.0f} people/s, up to "
            f"{report.at_once} shards at once in {report.workers} processes of at most "
            f"{report.peak_bytes / 1e6:,.0f} MB"
        )
    lines += [f"digest {manifest.digest}", f"in {manifest.folder} (left out: rejected.parquet)"]
    return "\n".join(lines)
