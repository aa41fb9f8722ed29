"""Predict: any pictures and videos through PosePredictor on Ray Data, into the formats that others read.

    sources, boxes -> work units -> Ray Data actors -> rows, kept as they come -> COCO, Parquet, OpenPose, ...

A picture that cannot be used costs a row in rejected.json, never the run. Memory holds a few pictures an
actor and the list of file names; everything else goes to disk unit by unit, and a second call goes on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ConfigError, DataError, ImageError
from hrnet_core.locations import is_uri, refuse_credentials
from pipelines.checkpoints import local_checkpoint
from pipelines.code_version import code_version
from pipelines.config import PredictSettings, RaySettings, TrackSettings
from pipelines.poses.formats import ROW, Row, check_formats, write_all
from pipelines.poses.units import UNFINISHED, Progress, Unit, digest_of, run_units, stored
from pipelines.poses.worker import Worker
from pipelines.sources.boxes import BoxesFile, Entry, number_in, read_boxes
from pipelines.sources.media import Listing, Media, Video, list_media

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
        people = (
            PersonDetector.load(detector, settings.cpus_per_worker, settings.use_gpu)
            if detector is not None
            else None
        )
        plan = make_plan(listing, given, people, settings, spec)
        out = Path(out) if out is not None else _default_folder(storage, listing, plan)
        if (done := _finished(out, plan)) is not None:
            return done
        store = out / UNFINISHED / plan.digest
        work = Worker(settings, people, "overlays" in settings.formats)
        start = time.monotonic()
        progress = run_units(plan.units, work, found.folder, settings, ray, store, "predict")
    counts, rejected = _write_formats(out, plan, listing, store, settings, spec)
    summary = _summary(plan, listing, settings, spec, progress)
    summary |= {
        "checkpoint": found.name,
        "counts": counts,
        "rejected": rejected,
        "seconds": round(time.monotonic() - start, 3),
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return Prediction(out, summary, progress.people_per_second)


# --- the plan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    units: list[Unit]
    rejected: list[Row]
    """Known before any picture was opened."""
    digest: str
    boxes: dict[str, Any]
    """Where boxes come from: source, and the file with its sha256."""
    unmatched: int = 0
    """Entries of the boxes file that fit no picture."""
    image_ids: str = "numbered"


def make_plan(
    listing: Listing,
    given: BoxesFile | None,
    detector: PersonDetector | None,
    settings: PredictSettings,
    spec: CheckpointSpec,
) -> Plan:
    """Pictures and stretches of videos with their boxes, in work units."""
    entries, unmatched = given.match(listing.media) if given else ({}, [])
    ids, id_source = _image_ids(listing.media, entries)
    rejected: list[Row] = []
    items = []
    for media in listing.media:
        entry = entries.get(media.name)
        if given is not None and entry is None:
            if given.complete:
                detail = f"{given.path} does not list it"
                rejected.append(_rejected(media.name, None, "not_in_boxes_file", detail))
                continue
            entry = Entry()  # a detector that found nobody leaves no trace
        if entry is not None:
            rejected += [_rejected(media.name, None, "bbox_invalid", why) for why in entry.invalid]
        item = {"name": media.name, "uri": media.uri, "kind": media.kind, "image_id": ids.get(media.name)}
        item |= {"boxes": None if entry is None else entry.rows, "size": entry.size if entry else None}
        if media.kind == "picture":
            items.append(item)
            continue
        try:
            items += _stretches(item, entry, settings)
        except ImageError as error:
            rejected.append(_rejected(media.name, None, error.reason, str(error)))
    source = "whole picture"
    boxes: dict[str, Any] = {"source": source}
    if given is not None:
        boxes = {"source": given.path, "sha256": given.sha256}
    if detector is not None:
        digest = hashlib.sha256(detector.model).hexdigest()
        boxes = {"source": detector.name, "sha256": digest, "declaration": vars(detector.declaration)}
    decides = [
        spec.as_dict(),
        items,
        [(m.size, m.modified_ns) for m in listing.media],
        boxes,
        settings.model_dump(exclude={"num_workers"}),
    ]
    units = _units(items, 2 * settings.batch_size)
    return Plan(units, rejected, digest_of(*decides), boxes, len(unmatched), id_source)


def _image_ids(media: Sequence[Media], entries: Mapping[str, Entry]) -> tuple[dict[str, int], str]:
    """Ids by name, and where they are from: the boxes file, the numbers that the names are (COCO's), or none.

    They are all of one origin, so that no two can be equal.
    """
    pictures = [m for m in media if m.kind == "picture"]
    if len(pictures) < len(media):
        return {}, "numbered"
    given = {m.name: entries[m.name].image_id for m in pictures if m.name in entries}
    named = {m.name: int(number_in(m.name) or -1) for m in pictures}
    for ids, origin in ((given, "boxes file"), (named, "file names")):
        distinct = {i for i in ids.values() if i is not None and i >= 0}
        if len(distinct) == len(pictures):
            return ids, origin  # type: ignore[return-value]
    return {}, "numbered"


def _stretches(
    item: dict[str, Any], entry: Entry | None, settings: PredictSettings
) -> Iterator[dict[str, Any]]:
    """A video cut into stretches of frames; the last one goes to the end, wherever that is."""
    video = Video(item["uri"], settings.max_pixels)
    video.close()
    length = 2 * settings.batch_size * settings.video_stride
    starts = list(range(0, max(1, video.expected), length))
    for start in starts:
        stop = start + length if start != starts[-1] else None
        stretch = {**item, "start": start, "stop": stop, "expected": video.expected}
        if entry is not None and entry.frames is not None:
            last = stop if stop is not None else max([*entry.frames, start]) + 1
            stretch["frames"] = {str(n): rows for n, rows in entry.frames.items() if start <= n < last}
        yield stretch


def _units(items: list[dict[str, Any]], people: int) -> list[Unit]:
    """Items in order, cut into units of at most `people` boxes; a stretch of video is a unit of its own."""
    units: list[Unit] = []
    room = 0
    for item in items:
        count = people if item["kind"] == "video" else max(1, len(item["boxes"] or [0]))
        if not units or count > room:
            units.append([])
            room = people
        room -= count
        units[-1].append(item)
    return units


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


def _rejected(name: str, frame: int | None, reason: str, detail: str) -> Row:
    return {**dict.fromkeys(ROW.names), "name": name, "frame": frame, "reason": reason, "detail": detail}


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
            f"{first['detail']} All of them: {out / 'rejected.json'}."
        )
    return {key: n for key, n in counts.items() if n and not key.startswith("rejected ")}, rejected


def _summary(
    plan: Plan, listing: Listing, settings: PredictSettings, spec: CheckpointSpec, progress: Progress
) -> dict[str, Any]:
    """What decides the poses, and what made them."""
    return {
        "weights_sha256": spec.weights_sha256,
        "mode": progress.mode,
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
