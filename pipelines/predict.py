"""Predict: any pictures and videos through PosePredictor on Ray Data, into the formats that others read.

    sources, boxes -> work units -> Ray Data actors -> rows, kept as they come -> COCO, Parquet, OpenPose, ...

A picture that cannot be used costs a row in rejected.json, never the run. Memory holds a few pictures an
actor and the list of file names; everything else goes to disk unit by unit, and a second call goes on.
"""

from __future__ import annotations

import datetime
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ConfigError, DataError
from hrnet_core.locations import is_uri, refuse_credentials
from pipelines.checkpoints import local_checkpoint
from pipelines.code_version import code_version
from pipelines.config import PredictSettings, RaySettings, TrackSettings
from pipelines.poses.formats import Row, check_formats, write_all
from pipelines.poses.plan import Plan, make_plan
from pipelines.poses.units import UNFINISHED, Outcomes, run_units, stored
from pipelines.poses.worker import Worker
from pipelines.sources.boxes import read_boxes
from pipelines.sources.media import Listing, list_media
from pipelines.storage import write_json

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec


SUMMARY = "prediction.json"


@dataclass(frozen=True)
class Prediction:
    """What `predict` did; the same stands in `folder`/prediction.json."""

    folder: Path
    summary: dict[str, Any]
    people_per_second: float = 0.0
    """While actors were at work; 0 where all was there."""

    def __str__(self) -> str:
        counts, speed = self.summary["counts"], self.people_per_second
        told = [f"{counts[what]:,} {what}" for what in ("pictures", "frames") if counts.get(what)]
        lines = [
            f"{counts.get('people', 0):,} people in {' and '.join(told)}, boxes: "
            + self.summary["boxes"]["source"]
            + (f"; {speed:.1f} people/s" if speed else "")
        ]
        rejected = self.summary["rejected"]
        if rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items()))
            lines.append(f"left out: {reasons}; each with its reason in rejected.json")
        if self.summary["boxes_unmatched"]:
            lines.append(f"{self.summary['boxes_unmatched']:,} entries of the boxes file fit no picture")
        lines.append(f"{', '.join(self.summary['formats'])}: {self.folder}")
        return "\n".join([*lines, f"image ids: {self.summary['image_ids']} (images.json)"])


def predict(
    sources: Sequence[str],
    checkpoint: str | Path | None = None,
    *,
    out: str | Path | None = None,
    boxes: str | Path | None = None,
    detector: str | Path | None = None,
    settings: PredictSettings | None = None,
    ray: RaySettings | None = None,
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
) -> Prediction:
    """Poses of all pictures and videos that the sources name (pipelines/sources/media.py).

    checkpoint: a folder, a URI of one or "models:/name@alias"; None: the champion of `track`.
    boxes: a JSON file (pipelines/sources/boxes.py). detector: an ONNX file with its declaration beside it
    (hrnet_core/detector.py). Neither: each picture is taken as one person. out: default
    STORAGE/predictions/NAME-DIGEST, so that the same call finds its own folder again.

    DataError: a source that names nothing, a boxes file that fits none of the pictures, or no picture at all
    that could be used. ConfigError: boxes and detector together, or `out` holds another prediction.
    """
    from hrnet_core.checkpoint import read_spec

    settings, ray, track = settings or PredictSettings(), ray or RaySettings(), track or TrackSettings()
    if boxes is not None and detector is not None:
        raise ConfigError(
            "boxes and detector are both given: where shall the boxes come from? Leave one out."
        )
    if is_uri(str(out)):
        refuse_credentials(str(out))
        raise ConfigError(
            f"out {out}: results are written to a folder of this machine. Copy them on from there."
        )
    with local_checkpoint(checkpoint, track, storage) as found:
        spec = read_spec(found.folder)
        check_formats(settings.formats, spec.skeleton)
        listing = list_media(sources, exclude=out or Path(storage) / "predictions")
        given = read_boxes(boxes, settings.score_threshold or 0.0) if boxes is not None else None
        people = None
        if detector is not None:
            people = PersonDetector.load(detector, settings.cpus_per_worker, settings.use_gpu)
        plan = make_plan(listing, given, people, settings, spec)
        out = Path(out) if out is not None else _default_folder(storage, listing, plan)
        if (done := _finished(out, plan)) is not None:
            return done
        store = out / UNFINISHED / plan.digest
        work = Worker(settings, people, "overlays" in settings.formats)
        start = time.monotonic()
        outcomes = run_units(plan.units, work, found.folder, settings, ray, store, "predict")
    counts, rejected = _write_formats(out, plan, listing, store, settings, spec)
    summary = _summary(plan, listing, settings, spec, outcomes) | {
        "checkpoint": found.name,
        "counts": counts,
        "rejected": rejected,
        "seconds": round(time.monotonic() - start, 3),
    }
    write_json(out / SUMMARY, summary)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return Prediction(out, summary, outcomes.people_per_second)


def _default_folder(storage: str | Path, listing: Listing, plan: Plan) -> Path:
    first = Path(listing.media[0].name).parts[0]
    return Path(storage) / "predictions" / f"{Path(first).stem}-{plan.digest[:8]}"


def _finished(out: Path, plan: Plan) -> Prediction | None:
    """The prediction that lies in `out`, if it is this one. ConfigError if it is another."""
    file = out / SUMMARY
    if not file.is_file():
        return None
    summary = json.loads(file.read_text())
    if summary.get("plan") != plan.digest:
        raise ConfigError(
            f"{out}: holds a prediction of other sources, boxes, weights or settings. Name another --out, or "
            f"remove that folder."
        )
    print(f"predict: {out} is there already, of the same sources and settings", flush=True)
    return Prediction(out, summary)


# --- what is written --------------------------------------------------------------------------------


def _write_formats(
    out: Path,
    plan: Plan,
    listing: Listing,
    store: Path,
    settings: PredictSettings,
    spec: CheckpointSpec,
) -> tuple[dict[str, int], dict[str, int]]:
    """All formats from the stored units; counts of what was answered, and of what was rejected by reason.

    DataError where no picture was usable.
    """
    counts = write_all(_rows(plan, store), listing.media, out, settings, spec.skeleton)
    rejected = {key.removeprefix("rejected "): n for key, n in counts.items() if key.startswith("rejected ")}
    if not counts["pictures"] + counts["frames"]:
        first = json.loads((out / "rejected.json").read_text())[0]
        raise DataError(
            f"none of {len(listing.media)} pictures and videos could be used. The first, {first['name']}: "
            f"{first['detail'].rstrip('.')}. All of them: {out / 'rejected.json'}."
        )
    return {key: n for key, n in counts.items() if n and not key.startswith("rejected ")}, rejected


def _summary(
    plan: Plan, listing: Listing, settings: PredictSettings, spec: CheckpointSpec, outcomes: Outcomes
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
        "passed_over": listing.passed_over,
        "predicted": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "plan": plan.digest,
    }


def _rows(plan: Plan, store: Path) -> Iterator[Row]:
    """Rows of all units in their order, one unit in memory at a time."""
    yield from plan.rejected
    for file in stored(store).values():
        yield from pq.read_table(file, page_checksum_verification=True).to_pylist()
