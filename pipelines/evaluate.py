"""Evaluate: photographs and boxes through PosePredictor on Ray Data, then OKS-AP by pycocotools.

    annotations, boxes -> work units -> Ray Data actors -> answers -> OKS-NMS -> results.json -> ten figures

The protocol is the published one (docs/evaluate.md). Three things make the figures independent of how
many actors work: units and the batches inside them are fixed by the data, each actor has a fixed number of
threads, and answers are sorted by (image_id, instance id) before anything is scored.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import CheckpointError, DataError, ImageError
from hrnet_core.geometry import box_to_center_scale
from hrnet_core.images import decode_image
from hrnet_core.oks import oks, oks_nms, rescore, soft_oks_nms
from hrnet_core.skeleton import Skeleton
from pipelines.coco import CocoSplit, Person, Photo, poses_to_results, read_coco, read_detections
from pipelines.config import EvaluateSettings, RaySettings, TrackSettings
from pipelines.paths import is_uri
from pipelines.report import Evaluation, Matched, contact_sheets, write_html
from pipelines.score import MAX_DETS, evaluate_results, read_json
from pipelines.units import UNFINISHED, Answer, Unit, digest_of, local_checkpoint, run_units, stored

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
        protocol=_protocol(people, spec, settings, mode),
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


# --- people and work units ----------------------------------------------------------------------------


@dataclass(frozen=True)
class People:
    """Whom to predict, and what they are scored against."""

    split: CocoSplit
    """With the boxes to predict, of the annotations or of a detector."""
    labelled: CocoSplit
    """With the annotations' people; the same as `split` for ground-truth boxes."""
    truth: dict[str, Any]
    """The whole annotation file, with crowds and people without keypoints."""
    boxes: tuple[str, str] | None = None
    """Name and sha256 of the detector's file; None: ground truth."""

    @property
    def photos(self) -> tuple[Photo, ...]:
        """Those with boxes, by image_id; their people are ordered by ann_id."""
        return tuple(photo for photo in self.split.photos if photo.people)


def read_people(
    coco_root: str | Path,
    split: str,
    boxes: str | Path | None,
    settings: EvaluateSettings,
    skeleton: Skeleton,
    checkpoint: str = "the checkpoint",
) -> People:
    """The split's people, or the detector's boxes on its photographs.

    A person whose annotation is unusable is left out of the prediction (as published) and stays in the
    ground truth: it counts as missed. A picture that is missing is refused: DataError lists them.
    """
    if is_uri(str(coco_root)):
        raise DataError(
            f"{coco_root}: evaluate reads photographs from a folder. Copy the split's files to one."
        )
    annotation_file = Path(coco_root) / "annotations" / f"person_keypoints_{split}.json"
    truth: dict[str, Any] = {}
    if annotation_file.is_file():  # else read_coco says what is wrong with the folder
        truth = read_json(annotation_file, "the annotations")[1]
        _check_skeleton(truth, annotation_file, skeleton, checkpoint)
    labelled = read_coco(coco_root, split, skeleton)
    lost = [(r.file, f"{r.reason}, {r.detail}") for r in labelled.rejected if r.ann_id is None]
    if lost:
        raise _unusable_photos(lost)
    if boxes is None:
        if settings.preset == "mmpose":
            labelled = _mmpose_boxes(labelled, truth)
        if not labelled.people:
            raise DataError(f"{annotation_file}: no person with keypoints and a box, nothing to evaluate.")
        return People(labelled, labelled, truth)
    detected = read_detections(boxes, labelled, settings.score_threshold)
    return People(detected, labelled, truth, (Path(boxes).name, _sha256(Path(boxes))))


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


def _check_skeleton(truth: Any, file: Path, skeleton: Skeleton, checkpoint: str) -> None:
    """CheckpointError unless the annotations' keypoints are those that the checkpoint was trained for."""
    categories = truth.get("categories") if isinstance(truth, dict) else None
    named = [c["keypoints"] for c in categories or () if isinstance(c, dict) and c.get("keypoints")]
    if len(named) == 1 and named[0] != list(skeleton.keypoints):
        raise CheckpointError(
            f"{checkpoint}: trained for the skeleton {skeleton.name!r}, {skeleton.num_keypoints} keypoints "
            f"({', '.join(skeleton.keypoints[:3])} ...), but 'categories' of {file} names {len(named[0])} "
            f"({', '.join(map(str, named[0][:3]))} ...). Evaluate it on annotations of its own skeleton, or "
            f"evaluate a checkpoint trained for this one."
        )


def _mmpose_boxes(split: CocoSplit, truth: dict[str, Any]) -> CocoSplit:
    """Ground-truth boxes by mmpose's rule: both corners clipped to the image, no pixel taken off the size
    (base_coco_style_dataset.py:283-290)."""
    raw = {a["id"]: a["bbox"] for a in truth["annotations"]}

    def box(photo: Photo, person: Person) -> NDArray[np.float32]:
        x, y, w, h = raw[person.ann_id]
        corners = np.clip([x, y, x + w, y + h], 0, np.array([photo.width, photo.height] * 2) - 1)
        return np.concatenate([corners[:2], corners[2:] - corners[:2]]).astype(np.float32)

    photos = tuple(
        replace(photo, people=tuple(replace(p, bbox_xywh=box(photo, p)) for p in photo.people))
        for photo in split.photos
    )
    return replace(split, photos=photos)


def _unusable_photos(problems: list[tuple[str, str]]) -> DataError:
    listed = "; ".join(f"{file}: {why}" for file, why in problems[:10])
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return DataError(
        f"{len(problems)} photographs cannot be used, so its AP would not be comparable: "
        f"{listed}{more}. Copy the photographs again, or take them and their annotations out of the set."
    )


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
        raise _unusable_photos(list(done.problems))
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


# --- from answers to results ----------------------------------------------------------------------------


def to_results(
    answers: NDArray[Any], people: People, spec: CheckpointSpec, settings: EvaluateSettings
) -> list[dict[str, Any]]:
    """COCO results of sorted answers: rescored, OKS-NMS within each image, sorted by (image_id, id).

    Score: mean of the keypoint scores above the threshold, times the box's (1 for ground truth), float64.
    NMS counts a person's area as that of the padded, aspect-fixed box (official coco.py:326-357).
    """
    asked = [person for photo in people.photos for person in photo.people]
    scores = rescore(answers["scores"], [p.score for p in asked], settings.keypoint_threshold)
    _, scale = box_to_center_scale([p.bbox_xywh for p in asked], spec.input_size, spec.padding)
    areas = scale.astype(np.float64).prod(axis=-1)
    suppress = soft_oks_nms if settings.soft_nms else oks_nms
    kept = []
    for rows in _by_image(answers["image_id"]):
        inside = suppress(
            answers["keypoints"][rows], scores[rows], areas[rows], spec.skeleton.oks_sigmas, settings.oks_nms
        )
        kept.append(rows.start + np.sort(inside))
    keep = np.concatenate(kept)
    return poses_to_results(
        answers["image_id"][keep],
        answers["id"][keep],
        answers["keypoints"][keep],
        answers["scores"][keep],
        scores[keep],
        people.split.category_id,
    )


def match_people(answers: NDArray[Any], people: People, skeleton: Skeleton) -> list[Matched]:
    """Each labelled person with its prediction: for ground-truth boxes its own, else the best by OKS."""
    where = {int(answers["image_id"][rows.start]): rows for rows in _by_image(answers["image_id"])}
    sigmas = np.array(skeleton.oks_sigmas)
    matched = []
    for photo in people.labelled.photos:
        here = answers[where.get(photo.image_id, slice(0, 0))]
        for person in photo.people:
            mine = here[here["id"] == person.ann_id] if people.boxes is None else here
            fits = oks(person.keypoints, mine["keypoints"], person.area, sigmas, person.visible)
            best = int(fits.argmax()) if len(mine) else None
            predicted = mine["keypoints"][best] if len(mine) else np.full(person.keypoints.shape, np.nan)
            squared = ((predicted - person.keypoints) ** 2).sum(axis=-1)
            similarity = np.nan_to_num(np.exp(-squared / (8 * sigmas**2 * person.area)))
            matched.append(
                Matched(
                    path=photo.path,
                    image_id=photo.image_id,
                    ann_id=person.ann_id,
                    bbox_xywh=person.bbox_xywh,
                    truth=person.keypoints,
                    visible=person.visible,
                    predicted=predicted,
                    scores=mine["scores"][best] if len(mine) else np.zeros(len(sigmas), np.float32),
                    oks=float(fits[best]) if len(mine) else 0.0,
                    similarity=np.where(person.visible > 0, similarity, np.nan),
                )
            )
    return matched


def _by_image(image_ids: NDArray[np.int64]) -> list[slice]:
    """Slices of equal neighbours."""
    edges = np.flatnonzero(np.diff(image_ids)) + 1
    return [slice(int(a), int(b)) for a, b in itertools.pairwise([0, *edges, len(image_ids)])]


# --- what is written ------------------------------------------------------------------------------------


def _protocol(people: People, spec: CheckpointSpec, settings: EvaluateSettings, mode: str) -> dict[str, Any]:
    """All that decides the figures. data_digest covers the annotation file and the boxes file."""
    name, sha256 = people.boxes or (None, None)
    content = f"{people.split.annotation_sha256} {sha256 or 'ground-truth'}"
    return {
        "data_digest": hashlib.sha256(content.encode()).hexdigest(),
        "boxes": "gt" if people.boxes is None else f"det {name} {sha256}",
        "boxes_file": name,
        "flip_test": settings.flip_test,
        "preset": _preset(settings),
        "split": people.split.name,
        "annotation_sha256": people.split.annotation_sha256,
        "boxes_sha256": sha256,
        "score_threshold": settings.score_threshold if people.boxes else None,
        "keypoint_threshold": settings.keypoint_threshold,
        "oks_nms": settings.oks_nms,
        "soft_nms": settings.soft_nms,
        "max_dets": MAX_DETS,
        "batch_size": settings.batch_size,
        "input_size": list(spec.input_size),
        "codec": spec.codec.as_dict(),
        "padding": spec.padding,
        "weights": spec.weights,
        "weights_sha256": spec.weights_sha256,
        "mode": mode,
        "skeleton": spec.skeleton.name,
        "oks_sigmas": list(spec.skeleton.oks_sigmas),
        "evaluator": f"pycocotools {version('pycocotools')}",
    }


def _preset(settings: EvaluateSettings) -> str:
    """The preset's name, with whatever departs from it: figures of different rules must not be compared."""
    plain = EvaluateSettings()
    rules = ("score_threshold", "keypoint_threshold", "oks_nms", "soft_nms")
    changed = [f"{r} {getattr(settings, r)}" for r in rules if getattr(settings, r) != getattr(plain, r)]
    return " ".join([settings.preset, *changed])


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
        "results_sha256": _sha256(evaluation.results_file),
    }
    (out / "evaluation.json").write_text(json.dumps(summary, indent=1) + "\n")
    sheets = contact_sheets(matched, spec.skeleton, out / "overlays")
    files = [evaluation.results_file, out / "evaluation.json", *sheets.values()]
    if report is not None:
        write_html(Path(report), evaluation, matched, sheets, spec.skeleton, made)
        files.append(Path(report))
    return files


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
