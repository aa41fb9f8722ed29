"""Evaluate: photographs and boxes through PosePredictor on Ray Data, then OKS-AP by pycocotools.

    annotations, boxes -> work units -> Ray Data actors -> answers -> OKS-NMS -> results.json -> ten figures

The protocol is the published one (docs/evaluate.md). Three things make the figures independent of how
many actors work: units and the batches inside them are fixed by the data, each pass of the network has a
fixed number of threads, and answers are sorted by (image_id, instance id) before anything is scored.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import CheckpointError, DataError
from hrnet_core.locations import file_to_write, folder_to_write
from hrnet_core.score_drift import SCORE_BOUNDS, score_counts
from pipelines.cluster.shared_paths import LOOKED_AT
from pipelines.pages.evaluation import contact_sheets, write_report
from pipelines.poses.actor import Outcome, Threads
from pipelines.poses.protocol import Evaluation, Matched, match_people, protocol_of, score_poses
from pipelines.poses.units import UNFINISHED, cut, digest_of, run_units
from pipelines.process.code_version import code_version
from pipelines.settings.config import EvaluateSettings, RaySettings, TrackSettings
from pipelines.sources.evaluation_set import EvaluationSet, read_evaluation_set, refuse_unusable
from pipelines.sources.photos import check_photo, decode_photo, left_out
from pipelines.sources.records import People, Photo, Rejection
from pipelines.storage.files import (
    file_stamps,
    join,
    on_this_machine,
    read_files,
    remove_folder,
    writable,
    write_json,
    write_whole,
)
from pipelines.tracking import registry
from pipelines.tracking.checkpoints import local_checkpoint
from pipelines.tracking.store import StoreAway, Tracker, store_of

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.predictor import Prepared

PhotoGroup = tuple[tuple[Photo, ...], People]
"""A work unit: some photographs and the people that are asked about, in order."""


def evaluate(
    checkpoint: str | Path,
    coco_root: str | Path,
    *,
    out: str | Path,
    split: str = "val2017",
    boxes: str | Path | None = None,
    settings: EvaluateSettings = EvaluateSettings(),
    ray: RaySettings = RaySettings(),
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
    report: str | Path | None = None,
) -> Evaluation:
    """OKS-AP of a checkpoint on the photographs of a COCO split.

    checkpoint: a folder, a URI of one, or "models:/name@alias". coco_root, boxes, out and report are paths or
    URIs. boxes: a detector's COCO results file; None takes the ground truth's boxes, of people with
    keypoints, as published. track: record the figures with
    the registered version (`storage` is the folder of MLflow's database where no server is named); None: no.
    Writes into `out`: results.json (COCO results), evaluation.json, overlays/*.jpg; `report` names one
    HTML page. A call that was cut short goes on from the units it has.

    DataError: COCO files, boxes or photographs that cannot be used, listed: a photograph left out in
    silence would change the figures. CheckpointError: another skeleton's checkpoint, or one giving NaN.
    ConfigError before the work where MLflow's server refuses us; StoreAway after it, all files written and
    the units kept, where the server does not answer then.
    """
    from hrnet_core.checkpoint import read_spec

    out = folder_to_write(out, "--out")
    report = None if report is None else file_to_write(report, "--report")
    if track is not None:
        store_of(track, storage)  # refused here, not when the figures are there
    with local_checkpoint(checkpoint, track or TrackSettings(), storage) as found:
        spec = read_spec(found.folder)
        of = read_evaluation_set(coco_root, split, boxes, settings, spec.skeleton, str(checkpoint))
        units, work = group_photos(of, 2 * settings.batch_size), functools.partial(answer, settings=settings)
        if track is not None and found.version is None:  # else it has answered
            _ask_store(track, storage)
        start = time.monotonic()
        store = join(out, f"{UNFINISHED}/{_plan_digest(of, spec, settings)}")
        read = [("COCO", photo.path) for photo, _ in of.photos[:LOOKED_AT]]
        done = run_units(units, work, found.folder, settings, ray, store, "evaluate", read)
    refuse_unusable(done.problems)
    answers = read_answers(read_files(done.answers), of.asked)
    keypoints, scores = answers["keypoints"], answers["scores"]
    stats, results = score_poses(keypoints, scores, of.asked, of.split.truth, spec, settings)
    matched = match_people(keypoints, scores, of, spec.skeleton)
    figures: dict[str, Any] = {
        "people": len(answers),
        "photos": len(of.photos),
        "results": len(results),
        "seconds": round(time.monotonic() - start, 3),
        "people_per_second": round(done.people_per_second, 3),
        "median_oks": float(np.median(matched.oks)) if len(matched.oks) else 0.0,
        "left_out": dict(Counter(of.left_out)),
        "repaired": dict(of.split.repaired),
        "doubts": dict(of.doubts),
        "keypoint_scores": keypoint_scores(scores),
    }
    evaluation = Evaluation(stats, protocol_of(of, spec, settings, done.mode), figures, out)
    with writable(out):
        files = _write(evaluation, results, matched, of, spec, settings.max_pixels, str(checkpoint), report)
    if track is not None:
        # An alias may have moved meanwhile; a folder is known by its weights.
        ref = f"{registry.REGISTERED}{found.version}" if found.version else str(spec.weights_sha256)
        evaluation = _recorded(evaluation, ref, files, track, storage)
    remove_folder(join(out, UNFINISHED))
    return evaluation


def _recorded(
    evaluation: Evaluation, ref: str, files: list[str], track: TrackSettings, storage: str | Path
) -> Evaluation:
    """With the version that MLflow now has the figures of. StoreAway, the table printed, where it does not
    answer."""
    try:
        with on_this_machine(files) as copies:
            version = registry.record_evaluation(
                ref,
                evaluation.stats,
                evaluation.protocol,
                copies,
                keypoint_scores=evaluation.figures["keypoint_scores"],
                track=track,
                storage=storage,
            )
    except StoreAway as error:
        print(evaluation.table(), flush=True)
        raise StoreAway(
            f"{error} The figures are in {join(evaluation.folder, 'evaluation.json')} and not recorded. The "
            f"work is kept: the same command records them."
        ) from error
    return replace(evaluation, version=version)


def _ask_store(track: TrackSettings, storage: str | Path) -> None:
    """A server that is away now may be back when there is something to record: a line. What it refuses is
    raised."""
    try:
        Tracker(track, storage, create=False)
    except StoreAway as error:
        goes_on = "The evaluation goes on: its files are written, and recorded if it answers then."
        print(f"{error} {goes_on}", flush=True)


def keypoint_scores(scores: NDArray[np.float32]) -> dict[str, list[Any]]:
    """How the scores (P, K) of the people that were asked about are distributed, as the predictor gave them:
    what an endpoint compares its own with."""
    return {"up_to": list(SCORE_BOUNDS), "counts": score_counts(scores).tolist()}


def group_photos(of: EvaluationSet, people: int) -> list[PhotoGroup]:
    """Photographs in order, cut into work units of at most `people` boxes (or one photo that has more)."""
    groups = cut(of.photos, lambda asked: asked[1].stop - asked[1].start, people)
    return [
        (tuple(photo for photo, _ in group), of.asked[group[0][1].start : group[-1][1].stop])
        for group in groups
    ]


def answer(group: PhotoGroup, threads: Threads, settings: EvaluateSettings) -> Outcome:
    """The work of an actor: npy bytes of an array (P,) with image_id, id, keypoints in photo px and scores as
    the predictor gave them, of a group's people; or why its photographs cannot be used.

    COCO's annotations live on stored pixels: EXIF orientation is ignored, as published.
    """
    photos, people = group
    # A clipped box may have lost its width or height; the crop follows from the other side.
    boxes = np.maximum(people.bbox_xywh, np.array([-np.inf, -np.inf, 1e-6, 1e-6], np.float32))
    asked = zip(photos, (boxes[rows] for rows in people.by_image().values()), strict=True)
    cut_out = functools.partial(_cut_out, threads=threads, max_pixels=settings.max_pixels)
    found = list(threads.read(cut_out, asked))
    if rejected := [one for one in found if isinstance(one, Rejection)]:
        return Outcome(b"", 0, tuple((r.file, f"{r.reason}, {r.detail}") for r in rejected))
    cut_outs = [one for one in found if not isinstance(one, Rejection)]
    poses = threads.predict(cut_outs, settings.flip_test, settings.batch_size, settings.preset)
    keypoints = np.concatenate([p.keypoints.xy for p in poses])
    shape = keypoints.shape[1:]
    kinds = [("image_id", "<i8"), ("id", "<i8"), ("keypoints", "<f4", shape), ("scores", "<f4", shape[:1])]
    answers = np.zeros(len(people), kinds)
    answers["image_id"], answers["id"] = people.image_id, people.ann_id
    answers["keypoints"] = keypoints
    answers["scores"] = np.concatenate([p.keypoints.conf for p in poses])
    content = io.BytesIO()
    np.save(content, answers, allow_pickle=False)
    return Outcome(content.getvalue(), len(answers))


def _cut_out(
    asked: tuple[Photo, NDArray[np.float32]], threads: Threads, max_pixels: int
) -> Prepared | Rejection:
    """The people of a photograph, whose pixels are not kept, or why it is out."""
    photo, boxes = asked
    try:
        checked = check_photo(photo, max_pixels)
    except DataError as error:  # a bucket that does not answer costs this unit, not those that are asked yet
        return left_out(photo, "unreadable", str(error).rstrip("."))
    if isinstance(checked, Rejection):
        return checked
    with threads.decoding:
        pixels = decode_photo(photo, checked)
        if isinstance(pixels, Rejection):
            return pixels
        (people,) = threads.predictor.prepare(pixels, boxes)
    return people


def read_answers(contents: Iterable[bytes], asked: People) -> NDArray[Any]:
    """What `answer` made of all groups, sorted by (image_id, id).

    RuntimeError unless every box has exactly one answer; CheckpointError for NaN.
    """
    answers = np.concatenate([np.load(io.BytesIO(content), allow_pickle=False) for content in contents])
    answers = answers[np.lexsort((answers["id"], answers["image_id"]))]
    wanted = Counter(zip(asked.image_id.tolist(), asked.ann_id.tolist(), strict=True))
    got = Counter(zip(answers["image_id"].tolist(), answers["id"].tolist(), strict=True))
    if wanted != got:
        lost, extra = wanted - got, got - wanted
        raise RuntimeError(
            f"{wanted.total()} boxes were asked and {got.total()} answers came: {lost.total()} are missing "
            f"{list(lost)[:3]}, {extra.total()} came twice or unasked {list(extra)[:3]} (image, instance id)"
        )
    bad = ~(np.isfinite(answers["keypoints"]).all(axis=(1, 2)) & np.isfinite(answers["scores"]).all(axis=1))
    if bad.any():
        raise CheckpointError(
            f"the checkpoint gives NaN or infinite keypoints for {bad.sum()} of {len(bad)} people, the first "
            f"in image {answers['image_id'][bad][0]}: its weights are damaged or its training diverged. "
            f"Evaluate an earlier checkpoint."
        )
    return answers


def _plan_digest(of: EvaluationSet, spec: CheckpointSpec, settings: EvaluateSettings) -> str:
    """16 hex digits of all that decides the answers of a unit, the photographs' size and time included."""
    return digest_of(
        spec.as_dict(),
        of.asked.image_id.tolist(),
        of.asked.ann_id.tolist(),
        of.asked.bbox_xywh.tolist(),
        file_stamps([photo.path for photo, _ in of.photos]),
        settings.model_dump(include={"flip_test", "preset", "batch_size", "mode", "use_gpu"}),
        settings.threads,
    )


def _write(
    evaluation: Evaluation,
    results: list[dict[str, Any]],
    matched: Matched,
    of: EvaluationSet,
    spec: CheckpointSpec,
    max_pixels: int,
    checkpoint: str,
    report: str | None,
) -> list[str]:
    """results.json, evaluation.json, overlays and the page; returns the files."""
    content, summary = json.dumps(results, allow_nan=False), join(evaluation.folder, "evaluation.json")
    made = {
        "checkpoint": checkpoint,
        "weights_sha256": spec.weights_sha256,
        "trained_as": spec.provenance.get("run_id"),
        "evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
    }
    found = {key: getattr(evaluation, key) for key in ("metric", "stats", "protocol", "figures")}
    write_whole(evaluation.results_file, content)
    write_json(summary, {**found, **made, "results_sha256": hashlib.sha256(content.encode()).hexdigest()})
    paths = {photo.image_id: photo.path for photo in of.split.photos}
    sheets = contact_sheets(matched, paths, spec.skeleton, join(evaluation.folder, "overlays"), max_pixels)
    files = [evaluation.results_file, summary, *sheets.values()]
    if report is not None:
        write_report(report, evaluation, matched, sheets, paths, spec.skeleton, made)
        files.append(report)
    return files
