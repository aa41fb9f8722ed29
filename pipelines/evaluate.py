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
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import CheckpointError, ImageError
from hrnet_core.images import decode_image
from pipelines.checkpoints import local_checkpoint
from pipelines.config import EvaluateSettings, RaySettings, TrackSettings
from pipelines.pages.evaluation import contact_sheets, write_html
from pipelines.poses.oks_ap import evaluate_results
from pipelines.poses.protocol import Evaluation, Matched, answer_dtype, match_people, protocol_of, to_results
from pipelines.poses.units import UNFINISHED, Answer, Unit, digest_of, run_units, stored
from pipelines.sources.evaluation_set import read_people, sha256_of_file, unusable_photos
from pipelines.sources.records import Photo

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
    with local_checkpoint(checkpoint, track or TrackSettings(), storage) as folder:
        spec = read_spec(folder)
        people = read_people(coco_root, split, boxes, settings, spec.skeleton, str(checkpoint))
        units = plan_units(people.photos, 2 * settings.batch_size)
        start = time.monotonic()
        store = out / UNFINISHED / _plan_digest(units, spec, settings)
        answers, mode, speed = predict_units(units, folder, settings, ray, store)
    results = to_results(answers, people, spec, settings)
    # A data set without areas (CrowdPose) is scored by its boxes.
    use_area = any("area" in annotation for annotation in people.truth["annotations"])
    stats = evaluate_results(results, people.truth, skeleton=spec.skeleton, use_area=use_area)
    matched = match_people(answers, people, spec.skeleton)

    evaluation = Evaluation(
        stats=stats,
        metric="eval_gt" if people.boxes is None else "eval_det",
        protocol=protocol_of(people, spec, settings, mode),
        figures={
            "people": len(answers),
            "photos": len(people.photos),
            "results": len(results),
            "seconds": round(time.monotonic() - start, 3),
            "people_per_second": round(speed, 3),
            "median_oks": float(np.median([m.oks for m in matched])) if matched else 0.0,
            "left_out": dict(Counter(r.reason for r in people.split.rejected)),
        },
        folder=out,
    )
    files = _write(evaluation, results, matched, spec, str(checkpoint), report)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    if track is not None:
        from pipelines.tracking import record_evaluation

        version = record_evaluation(
            str(checkpoint), stats, evaluation.protocol, files, track=track, storage=storage
        )
        evaluation = replace(evaluation, version=version)
    return evaluation


def plan_units(photos: Sequence[Photo], people: int) -> list[Unit]:
    """Photos in order, cut into work units of at most `people` boxes (or one photo that has more).

    A photograph of a unit is {image_id, path, width, height, ids, boxes}.
    """
    units: list[Unit] = []
    room = 0
    for photo in photos:
        if not units or len(photo.people) > room:
            units.append([])
            room = people
        room -= len(photo.people)
        units[-1].append(
            {
                "image_id": photo.image_id,
                "path": str(Path(photo.path).absolute()),
                "width": photo.width,
                "height": photo.height,
                "ids": [p.ann_id for p in photo.people],
                # A clipped box may have lost its width or height; the crop follows from the other side.
                "boxes": [
                    np.maximum(p.bbox_xywh, [-np.inf, -np.inf, 1e-6, 1e-6]).tolist() for p in photo.people
                ],
            }
        )
    return units


def answer_unit(unit: Unit, predictor: PosePredictor, settings: EvaluateSettings) -> Answer:
    """Boxes of a unit -> answers (P,) of answer_dtype as npy bytes, or why its photos are unusable.

    COCO's annotations live on stored pixels: EXIF orientation is ignored, as published.
    """
    images, problems = [], []
    for photo in unit:
        try:
            image = decode_image(Path(photo["path"]).read_bytes(), apply_exif=False)
        except (OSError, ImageError) as error:
            problems.append((photo["path"], getattr(error, "strerror", None) or str(error)))
            continue
        height, width = image.shape[:2]
        if (width, height) != (photo["width"], photo["height"]):
            annotated = f"{photo['width']}x{photo['height']}"
            problems.append((photo["path"], f"is {width}x{height} px, annotated as {annotated}"))
        images.append(image)
    if problems:
        return Answer(b"", 0, tuple(problems))
    poses = predictor(
        images,
        boxes_xywh=[np.array(photo["boxes"], np.float32) for photo in unit],
        flip_test=settings.flip_test,
        batch_size=settings.batch_size,
        border=settings.preset,
    )
    people = sum(len(photo["ids"]) for photo in unit)
    answers = np.zeros(people, answer_dtype(predictor.spec.skeleton.num_keypoints))
    answers["image_id"] = np.repeat([p["image_id"] for p in unit], [len(p["ids"]) for p in unit])
    answers["id"] = np.concatenate([photo["ids"] for photo in unit])
    answers["keypoints"] = np.concatenate([p.keypoints.xy for p in poses])
    answers["scores"] = np.concatenate([p.keypoints.conf for p in poses])
    content = io.BytesIO()
    np.save(content, answers, allow_pickle=False)
    return Answer(content.getvalue(), people)


def predict_units(
    units: list[Unit], checkpoint: Path, settings: EvaluateSettings, ray: RaySettings, store: Path
) -> tuple[NDArray[Any], str, float]:
    """Answers to all boxes sorted by (image_id, id), the mode they were computed in, and people/s.

    Every box is answered exactly once, or it is an error. DataError names all unusable photographs.
    """
    work = functools.partial(answer_unit, settings=settings)
    done = run_units(units, work, checkpoint, settings, ray, store, "evaluate")
    if done.problems:
        raise unusable_photos(list(done.problems))
    answers = np.concatenate([np.load(file, allow_pickle=False) for file in stored(store).values()])
    answers = answers[np.lexsort((answers["id"], answers["image_id"]))]
    check_answers(units, answers)
    return answers, done.mode, done.people_per_second


def check_answers(units: list[Unit], answers: NDArray[Any]) -> None:
    """RuntimeError unless every box of the units has exactly one answer; CheckpointError for NaN."""
    asked = Counter((photo["image_id"], i) for unit in units for photo in unit for i in photo["ids"])
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


def _plan_digest(units: list[Unit], spec: CheckpointSpec, settings: EvaluateSettings) -> str:
    """16 hex digits of all that decides the answers of a unit, the photographs' size and time included."""
    files = [os.stat(p["path"]) if os.path.exists(p["path"]) else None for unit in units for p in unit]
    decides = [
        spec.as_dict(),
        units,
        [(f.st_size, f.st_mtime_ns) if f else None for f in files],
        settings.model_dump(
            include={"flip_test", "preset", "batch_size", "mode", "cpus_per_worker", "use_gpu"}
        ),
    ]
    return digest_of(*decides)


def _write(
    evaluation: Evaluation,
    results: list[dict[str, Any]],
    matched: list[Matched],
    spec: CheckpointSpec,
    checkpoint: str,
    report: str | Path | None,
) -> list[Path]:
    """results.json, evaluation.json, overlays and the page; returns the files."""
    out = evaluation.folder
    evaluation.results_file.write_text(json.dumps(results, allow_nan=False))
    made = {
        "checkpoint": checkpoint,
        "weights_sha256": spec.weights_sha256,
        "trained_as": spec.provenance.get("run_id"),
        "evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_version": version("hrnet-ray"),
    }
    summary = {
        "metric": evaluation.metric,
        "stats": evaluation.stats,
        "protocol": evaluation.protocol,
        "figures": evaluation.figures,
        **made,
        "results_sha256": sha256_of_file(evaluation.results_file),
    }
    (out / "evaluation.json").write_text(json.dumps(summary, indent=1) + "\n")
    sheets = contact_sheets(matched, spec.skeleton, out / "overlays")
    files = [evaluation.results_file, out / "evaluation.json", *sheets.values()]
    if report is not None:
        write_html(Path(report), evaluation, matched, sheets, spec.skeleton, made)
        files.append(Path(report))
    return files
