"""Evaluate: photographs and boxes through PosePredictor on Ray Data, then OKS-AP by pycocotools.

    annotations, boxes -> work units -> Ray Data actors -> answers -> OKS-NMS -> results.json -> ten figures

The protocol is the published one (docs/evaluate.md). Three things make the figures independent of how
many actors work: units and the batches inside them are fixed by the data, each actor has a fixed number of
threads, and answers are sorted by (image_id, instance id) before anything is scored.
"""

from __future__ import annotations

import datetime
import functools
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pyarrow.fs import LocalFileSystem

from hrnet_core.errors import CheckpointError
from pipelines.checkpoints import local_checkpoint
from pipelines.code_version import code_version
from pipelines.config import EvaluateSettings, RaySettings, TrackSettings
from pipelines.pages.evaluation import contact_sheets, write_report
from pipelines.poses.protocol import Evaluation, Matched, match_people, protocol_of, score_poses
from pipelines.poses.units import UNFINISHED, Outcome, digest_of, run_units, stored
from pipelines.sources.evaluation_set import EvaluationSet, read_evaluation_set, refuse_unusable
from pipelines.sources.photos import open_photo
from pipelines.sources.records import People, Photo, Rejection
from pipelines.storage import sha256_of, write_json, write_whole

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.predictor import PosePredictor


def evaluate(
    checkpoint: str | Path,
    coco_root: str | Path,
    *,
    out: str | Path,
    split: str = "val2017",
    boxes: str | Path | None = None,
    settings: EvaluateSettings | None = None,
    ray: RaySettings | None = None,
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
    report: str | Path | None = None,
) -> Evaluation:
    """OKS-AP of a checkpoint on the photographs of a COCO split.

    checkpoint: a folder, a URI of one, or "models:/name@alias". boxes: a detector's COCO results file; None
    takes the ground truth's boxes, of people with keypoints, as published. track: record the figures with
    the registered version (`storage` is the folder of MLflow's database where no server is named); None: no.
    Writes into `out`: results.json (COCO results), evaluation.json, overlays/*.jpg; `report` names one
    HTML page. A call that was cut short goes on from the units it has.

    DataError: COCO files, boxes or photographs that cannot be used, listed: a photograph left out in
    silence would change the figures. CheckpointError: another skeleton's checkpoint, or one giving NaN.
    """
    from hrnet_core.checkpoint import read_spec

    settings, ray = settings or EvaluateSettings(), ray or RaySettings()
    out = Path(out)
    with local_checkpoint(checkpoint, track or TrackSettings(), storage) as found:
        spec = read_spec(found.folder)
        of = read_evaluation_set(coco_root, split, boxes, settings, spec.skeleton, str(checkpoint))
        groups = group_photos(of, 2 * settings.batch_size)
        start = time.monotonic()
        store = out / UNFINISHED / _plan_digest(of, spec, settings)
        answers, mode, speed = predict_groups(groups, found.folder, settings, ray, store)
    stats, results = score_poses(
        answers["keypoints"], answers["scores"], of.asked, of.split.truth, spec, settings
    )
    matched = match_people(answers["keypoints"], answers["scores"], of, spec.skeleton)

    evaluation = Evaluation(
        stats=stats,
        metric="eval_gt" if of.boxes is None else "eval_det",
        protocol=protocol_of(of, spec, settings, mode),
        figures={
            "people": len(answers),
            "photos": len(of.photos),
            "results": len(results),
            "seconds": round(time.monotonic() - start, 3),
            "people_per_second": round(speed, 3),
            "median_oks": float(np.median(matched.oks)) if len(matched.oks) else 0.0,
            "left_out": dict(Counter(of.left_out)),
        },
        folder=out,
    )
    paths = {photo.image_id: photo.path for photo in of.split.photos}
    files = _write(evaluation, results, matched, paths, spec, settings, str(checkpoint), report)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    if track is not None:
        from pipelines.registry import REGISTERED, record_evaluation

        # An alias may have moved meanwhile; a folder is known by its weights.
        ref = f"{REGISTERED}{found.version}" if found.version else spec.weights_sha256
        version = record_evaluation(ref, stats, evaluation.protocol, files, track=track, storage=storage)
        evaluation = replace(evaluation, version=version)
    return evaluation


@dataclass(frozen=True, eq=False)
class PhotoGroup:
    """A work unit: some photographs and the people that are asked about, in order."""

    photos: tuple[Photo, ...]
    people: People


def group_photos(of: EvaluationSet, people: int) -> list[PhotoGroup]:
    """Photographs in order, cut into work units of at most `people` boxes (or one photo that has more)."""
    groups: list[list[tuple[Photo, slice]]] = []
    room = 0
    for photo, rows in of.photos:
        count = rows.stop - rows.start
        if not groups or count > room:
            groups.append([])
            room = people
        room -= count
        groups[-1].append((photo, rows))
    return [
        PhotoGroup(tuple(photo for photo, _ in group), of.asked[group[0][1].start : group[-1][1].stop])
        for group in groups
    ]


# --- prediction: one unit, and all of them on Ray -------------------------------------------------------


def answer_dtype(num_keypoints: int) -> np.dtype[Any]:
    """One answered box: photo px and scores as the predictor gave them."""
    return np.dtype(
        [
            ("image_id", "<i8"),
            ("id", "<i8"),
            ("keypoints", "<f4", (num_keypoints, 2)),
            ("scores", "<f4", (num_keypoints,)),
        ]
    )


def predict_group(
    group: PhotoGroup, predictor: PosePredictor, settings: EvaluateSettings
) -> NDArray[Any] | list[Rejection]:
    """Answers (P,) of answer_dtype for a group's people, or why its photographs cannot be used.

    COCO's annotations live on stored pixels: EXIF orientation is ignored, as published.
    """
    opened = [open_photo(photo, settings.max_pixels) for photo in group.photos]
    if rejected := [one for one in opened if isinstance(one, Rejection)]:
        return rejected
    # A clipped box may have lost its width or height; the crop follows from the other side.
    boxes = np.maximum(group.people.bbox_xywh, np.array([-np.inf, -np.inf, 1e-6, 1e-6], np.float32))
    rows = group.people.by_image()
    poses = predictor(
        [one[0] for one in opened if not isinstance(one, Rejection)],
        boxes_xywh=[boxes[rows[photo.image_id]] for photo in group.photos],
        flip_test=settings.flip_test,
        batch_size=settings.batch_size,
        border=settings.preset,
    )
    answers = np.zeros(len(group.people), answer_dtype(predictor.spec.skeleton.num_keypoints))
    answers["image_id"], answers["id"] = group.people.image_id, group.people.ann_id
    answers["keypoints"] = np.concatenate([p.keypoints.xy for p in poses])
    answers["scores"] = np.concatenate([p.keypoints.conf for p in poses])
    return answers


def answer_unit(group: PhotoGroup, predictor: PosePredictor, settings: EvaluateSettings) -> Outcome:
    """predict_group for an actor: npy bytes, or the problems."""
    answers = predict_group(group, predictor, settings)
    if isinstance(answers, list):
        return Outcome(b"", 0, tuple((r.file, f"{r.reason}, {r.detail}") for r in answers))
    content = io.BytesIO()
    np.save(content, answers, allow_pickle=False)
    return Outcome(content.getvalue(), len(answers))


def predict_groups(
    groups: list[PhotoGroup], checkpoint: Path, settings: EvaluateSettings, ray: RaySettings, store: Path
) -> tuple[NDArray[Any], str, float]:
    """Answers to all boxes sorted by (image_id, id), the mode they were computed in, and people/s.

    Every box is answered exactly once, or it is an error. DataError names all unusable photographs.
    """
    work = functools.partial(answer_unit, settings=settings)
    done = run_units(groups, work, checkpoint, settings, ray, store, "evaluate")
    refuse_unusable(done.problems)
    answers = np.concatenate([np.load(file, allow_pickle=False) for file in stored(store).values()])
    answers = answers[np.lexsort((answers["id"], answers["image_id"]))]
    check_answers(groups, answers)
    return answers, done.mode, done.people_per_second


def check_answers(groups: Sequence[PhotoGroup], answers: NDArray[Any]) -> None:
    """RuntimeError unless every box of the groups has exactly one answer; CheckpointError for NaN."""
    asked = Counter(
        pair
        for group in groups
        for pair in zip(group.people.image_id.tolist(), group.people.ann_id.tolist(), strict=True)
    )
    got = Counter(zip(answers["image_id"].tolist(), answers["id"].tolist(), strict=True))
    if asked != got:
        lost, extra = asked - got, got - asked
        raise RuntimeError(
            f"{asked.total()} boxes were asked and {got.total()} answers came: {lost.total()} are missing "
            f"{list(lost)[:3]}, {extra.total()} came twice or unasked {list(extra)[:3]} (image, instance id)"
        )
    bad = ~(np.isfinite(answers["keypoints"]).all(axis=(1, 2)) & np.isfinite(answers["scores"]).all(axis=1))
    if bad.any():
        raise CheckpointError(
            f"the checkpoint gives NaN or infinite keypoints for {bad.sum()} of {len(bad)} people, the first "
            f"in image {answers['image_id'][bad][0]}: its weights are damaged or its training diverged. "
            f"Evaluate an earlier checkpoint."
        )


def _plan_digest(of: EvaluationSet, spec: CheckpointSpec, settings: EvaluateSettings) -> str:
    """16 hex digits of all that decides the answers of a unit, the photographs' size and time included."""
    files = [os.stat(photo.path) if os.path.exists(photo.path) else None for photo, _ in of.photos]
    return digest_of(
        spec.as_dict(),
        of.asked.image_id.tolist(),
        of.asked.ann_id.tolist(),
        of.asked.bbox_xywh.tolist(),
        [(f.st_size, f.st_mtime_ns) if f else None for f in files],
        settings.model_dump(
            include={"flip_test", "preset", "batch_size", "mode", "cpus_per_worker", "use_gpu"}
        ),
    )


def _write(
    evaluation: Evaluation,
    results: list[dict[str, Any]],
    matched: Matched,
    paths: Mapping[int, str],
    spec: CheckpointSpec,
    settings: EvaluateSettings,
    checkpoint: str,
    report: str | Path | None,
) -> list[Path]:
    """results.json, evaluation.json, overlays and the page; returns the files. paths: of the photos by id."""
    out = evaluation.folder
    write_whole(evaluation.results_file, json.dumps(results, allow_nan=False))
    made = {
        "checkpoint": checkpoint,
        "weights_sha256": spec.weights_sha256,
        "trained_as": spec.provenance.get("run_id"),
        "evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
    }
    summary = {
        "metric": evaluation.metric,
        "stats": evaluation.stats,
        "protocol": evaluation.protocol,
        "figures": evaluation.figures,
        **made,
        "results_sha256": sha256_of(LocalFileSystem(), str(evaluation.results_file.absolute())),
    }
    write_json(out / "evaluation.json", summary)
    sheets = contact_sheets(matched, paths, spec.skeleton, out / "overlays", settings.max_pixels)
    files = [evaluation.results_file, out / "evaluation.json", *sheets.values()]
    if report is not None:
        write_report(report, evaluation, matched, sheets, spec.skeleton, made)
        files.append(Path(report))
    return files
