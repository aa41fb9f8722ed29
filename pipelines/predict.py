"""Predict: any pictures and videos through PosePredictor on Ray Data, into the formats that others read.

    sources, boxes -> work units -> Ray Data actors -> rows, kept as they come -> COCO, Parquet, OpenPose, ...

A picture that cannot be used costs a row in rejected.json, never the run. Memory holds a few pictures an
actor and the list of file names; everything else goes to disk unit by unit, and a second call goes on.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ConfigError
from hrnet_core.locations import destination, folder_to_write
from pipelines.cluster.shared_paths import LOOKED_AT
from pipelines.poses.formats import Row, check_formats, write_all
from pipelines.poses.plan import Plan, make_plan
from pipelines.poses.units import UNFINISHED, Outcomes, run_units
from pipelines.poses.worker import Worker
from pipelines.process.code_version import code_version
from pipelines.settings.config import PredictSettings, RaySettings, TrackSettings
from pipelines.sources.boxes import read_boxes
from pipelines.sources.media import Media, list_media
from pipelines.storage.files import join, read_files, read_json, remove_folder, writable, write_json
from pipelines.tracking.checkpoints import local_checkpoint

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec


SUMMARY = "prediction.json"


@dataclass(frozen=True)
class Prediction:
    """What `predict` did; the same stands in `folder`/prediction.json."""

    folder: str
    """Path or URI."""
    summary: dict[str, Any]
    people_per_second: float = 0.0
    """While actors were at work; 0 where all was there."""

    def __str__(self) -> str:
        told, speed = self.summary, self.people_per_second
        counts = told["counts"]
        answered = [f"{counts[what]:,} {what}" for what in ("pictures", "frames") if counts.get(what)]
        lines = [
            f"{counts.get('people', 0):,} people in {' and '.join(answered)}, boxes: "
            + told["boxes"]["source"]
            + (f"; {speed:.1f} people/s" if speed else "")
        ]
        if told["rejected"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(told["rejected"].items()))
            lines.append(f"left out: {reasons}; each with its reason in rejected.json")
        if several := counts.get("first_of_several"):
            lines.append(f"{several:,} files hold several frames or pages: the first of each was taken")
        if told["passed_over"]:
            lines.append(
                f"{told['passed_over']:,} files of the folders are no pictures or videos by their names"
            )
        if told["boxes_unmatched"]:
            lines.append(f"{told['boxes_unmatched']:,} entries of the boxes file fit no picture")
        lines.append(f"{', '.join(told['formats'])}: {self.folder}")
        return "\n".join([*lines, f"image ids: {told['image_ids']} (images.json)"])


def predict(
    sources: Sequence[str | Path],
    checkpoint: str | Path | None = None,
    *,
    out: str | Path | None = None,
    boxes: str | Path | None = None,
    detector: str | Path | None = None,
    settings: PredictSettings = PredictSettings(),
    ray: RaySettings = RaySettings(),
    track: TrackSettings = TrackSettings(),
    storage: str | Path = "runs",
) -> Prediction:
    """Poses of all pictures and videos that the sources name (pipelines/sources/media.py). Sources, boxes,
    detector, out and storage are paths or URIs.

    checkpoint: a folder, a URI of one or "models:/name@alias"; None: the champion of `track`.
    boxes: a JSON file (pipelines/sources/boxes.py). detector: an ONNX file with its declaration beside it
    (hrnet_core/detector.py). Neither: each picture is taken as one person. out: default
    STORAGE/predictions/NAME-DIGEST, so that the same call finds its own folder again.

    DataError: a source that names nothing, a boxes file that fits none of the pictures, or no picture at all
    that could be used. ConfigError: boxes and detector together, or `out` holds another prediction.
    """
    from hrnet_core.checkpoint import read_spec

    if boxes is not None and detector is not None:
        raise ConfigError("boxes and detector are both given: where do the boxes come from? Leave one out.")
    if out is None:
        storage = destination(storage, "--run.storage")  # where the default is
    else:
        out = folder_to_write(out, "--out")
    with local_checkpoint(checkpoint, track, storage) as found:
        spec = read_spec(found.folder)
        check_formats(settings.formats, spec.skeleton)
        media, passed_over = list_media(sources, exclude=out or join(str(storage), "predictions"))
        given = None
        if boxes is not None:
            given = read_boxes(boxes, settings.score_threshold or 0.0, settings.boxes_category)
        people = None
        if detector is not None:
            people = PersonDetector.load(detector, settings.threads, settings.use_gpu)
        plan = make_plan(media, given, people, settings, spec)
        out = out or _default_folder(storage, media[0], plan)
        if (done := _finished(out, plan)) is not None:
            return done
        start, store = time.monotonic(), join(out, f"{UNFINISHED}/{plan.digest}")
        work = Worker(settings, people)
        read = [("SOURCE", one.uri) for one in media[:LOOKED_AT]]
        outcomes = run_units(plan.units, work, found.folder, settings, ray, store, "predict", read)
    rows = _rows(plan.rejected, outcomes.answers)
    with writable(out):
        counts, rejected = write_all(rows, media, out, settings, spec.skeleton)
    summary = _summary(plan, passed_over, settings, spec, outcomes) | {
        "checkpoint": found.name,
        "counts": dict(+counts),
        "rejected": dict(rejected),
        "seconds": round(time.monotonic() - start, 3),
    }
    with writable(out):
        write_json(join(out, SUMMARY), summary)
    remove_folder(join(out, UNFINISHED))
    return Prediction(out, summary, outcomes.people_per_second)


def _default_folder(storage: str | Path, first: Media, plan: Plan) -> str:
    name = Path(first.name).parts[0]
    return join(str(storage), f"predictions/{Path(name).stem}-{plan.digest[:8]}")


def _finished(out: str, plan: Plan) -> Prediction | None:
    """The prediction that lies in `out`, if it is this one. ConfigError if it is another."""
    summary = read_json(join(out, SUMMARY))
    if summary is None:
        return None
    if summary.get("plan") != plan.digest:
        raise ConfigError(
            f"{out}: holds a prediction of other sources, boxes, weights or settings. Name another --out, or "
            f"remove that folder."
        )
    print(f"predict: {out} is there already, of the same sources and settings", flush=True)
    return Prediction(out, summary)


def _summary(
    plan: Plan, passed_over: int, settings: PredictSettings, spec: CheckpointSpec, outcomes: Outcomes
) -> dict[str, Any]:
    """What decides the poses, and what made them."""
    return {
        "weights_sha256": spec.weights_sha256,
        "mode": outcomes.mode,
        "flip_test": spec.flip_test if settings.flip_test is None else settings.flip_test,
        "input_size": list(spec.input_size),
        "codec": spec.codec.as_dict(),
        "keypoints": list(spec.skeleton.keypoints),
        "boxes": plan.boxes,
        "boxes_unmatched": plan.unmatched,
        "exif": "applied" if settings.exif else "ignored",
        "image_ids": plan.image_ids,
        "formats": list(settings.formats),
        "passed_over": passed_over,
        "predicted": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "plan": plan.digest,
    }


def _rows(rejected: list[Row], answers: list[str]) -> Iterator[Row]:
    """Rows of all units in their order, one unit in memory at a time; of a bucket's, some are read ahead."""
    yield from rejected
    for content in read_files(answers):
        yield from pq.read_table(pa.BufferReader(content), page_checksum_verification=True).to_pylist()
