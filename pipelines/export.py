"""`hrnet export`: the network as a file of another runtime, written only after that gave the same answers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrnet_core.choices import FormatName
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.locations import destination, is_uri, one_line
from pipelines.evaluate import answer, group_photos, read_answers
from pipelines.poses.actor import Threads
from pipelines.poses.protocol import score_poses
from pipelines.settings.config import EvaluateSettings, TrackSettings
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_rows, read_row_group
from pipelines.shards.schema import CROP_COLUMNS
from pipelines.sources.evaluation_set import EvaluationSet, read_evaluation_set, refuse_unusable
from pipelines.sources.records import on_photos
from pipelines.storage.files import join, writing
from pipelines.tracking.checkpoints import local_checkpoint
from pipelines.tracking.registry import REGISTERED

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.model import HRNet
    from hrnet_core.predictor import PosePredictor


class Format(NamedTuple):
    """What a format is held to, before anything is left on the disk."""

    runtime: str
    """Who answers from the file."""
    cell: float
    """Largest difference of a heatmap cell, of a decoded file of a score, in ranges of the heatmaps."""
    keypoint: float
    """Mean distance of the keypoints, px of the crop."""


FORMATS: dict[FormatName, Format] = {
    # Rounding in another order gives about 1e-5 of the range; a keypoint jumps where two cells are equal.
    "onnx": Format("ONNX Runtime", 1e-3, np.inf),
    "onnx_decoded": Format("ONNX Runtime", 1e-3, 0.5),
    "onnx_float16": Format("ONNX Runtime", 2e-2, 4.0),
    "openvino": Format("OpenVINO", 1e-3, np.inf),
    # How much worse it is says the AP; a keypoint that is a whole cell off on average is broken.
    "openvino_int8": Format("OpenVINO", 0.5, 4.0),
    "ncnn": Format("ncnn", 1e-3, np.inf),
}
CALIBRATION = 300
"""Crops of the shards from which int8 takes the ranges of the activations."""
COMPARED = 32
"""Of these, how many are compared: on the recorded crops, which are noise, int8 says nothing."""


@dataclass(frozen=True)
class Parity:
    """How far a file is from torch in float32, on the same crops."""

    file: str
    """Path or URI."""
    format: FormatName
    megabytes: float
    crops: int
    cell: float
    """Largest absolute difference of a heatmap cell; of a decoded file of a score, which is one."""
    spread: float
    """The heatmaps' range, highest less lowest cell."""
    keypoint_mean: float
    """Distance of the decoded keypoints, crop px."""
    keypoint_max: float
    moved: int
    """Keypoints further than 0.5 crop px apart: elsewhere on the map two cells were equal up to rounding."""
    people: int = 0
    """Of COCO, where keypoints and AP are of them; 0 without COCO, and the keypoints are of the crops."""
    ap: tuple[float, float] | None = None
    """Torch's, and the file's."""

    def __str__(self) -> str:
        what = "scores  " if self.format == "onnx_decoded" else "heatmaps"
        lines = [
            f"wrote {self.file} ({self.megabytes:.1f} MiB)",
            f"{FORMATS[self.format].runtime} against torch in float32, {self.crops} crops:",
            f"  {what}   largest difference {self.cell:.2e}, {self.cell / self.spread:.1e} of their range",
            *([f"and {self.people} people of COCO:"] if self.people else []),
            f"  keypoints  mean {self.keypoint_mean:.2e} px of the crop, largest {self.keypoint_max:.2e} px, "
            f"{self.moved} further than 0.5 px",
        ]
        if self.ap is None:
            lines.append("  AP         not compared: name a COCO folder with --coco")
        else:
            torch_ap, other_ap = self.ap
            difference = f"difference {other_ap - torch_ap:+.4f}"
            lines.append(f"  AP         {torch_ap:.4f} and {other_ap:.4f}, {difference}")
        return "\n".join(lines)


def export(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    format: FormatName = "onnx",
    shards: str | Path | None = None,
    shards_split: str = "train2017",
    coco_root: str | Path | None = None,
    split: str = "val2017",
    boxes: str | Path | None = None,
    people: int = 200,
    settings: EvaluateSettings = EvaluateSettings(),
    track: TrackSettings = TrackSettings(),
    storage: str | Path = "runs",
) -> Parity:
    """Write the checkpoint's network for another runtime (docs/export.md) and compare it with torch. All
    paths may be URIs.

    out: default model.onnx, openvino_int8.xml or model.ncnn.param in the checkpoint folder, where modes find
    them; the other formats must name a file. A .bin is written beside an .xml, a .ncnn.bin and a .ncnn.json
    beside a .ncnn.param. shards: int8 is calibrated on crops of their
    `shards_split`. coco_root: compare also on the first photographs that hold `people` people, with AP.
    settings.flip_test: also what a decoded file does. Runs in this process.

    ConfigError: a package is missing, or the file's answers are not torch's (FORMATS; no file is left then).
    CheckpointError, DataError: as in evaluating, and shards of another input size.
    """
    from hrnet_core.checkpoint import load_checkpoint, read_spec

    if out is None and str(checkpoint).startswith(REGISTERED):
        raise ConfigError(
            f"name the file to write, hrnet export {checkpoint} OUT: the files of a registered version stay "
            f"as they are."
        )
    file = None if out is None else destination(out, "OUT")
    with local_checkpoint(checkpoint, track, storage) as found:
        folder = found.folder
        spec = read_spec(folder)  # before a folder is made where there is none
        targets = _targets(str(checkpoint), file, format)
        crops = recorded_crops(folder)
        if format == "openvino_int8":
            crops = shard_crops(shards, shards_split, spec)
        everyone = None
        if coco_root is not None:
            everyone = read_evaluation_set(coco_root, split, boxes, settings, spec.skeleton)
        flip = settings.flip_test
        try:
            with contextlib.ExitStack() as stack:
                parts = [stack.enter_context(writing(target)) for target in targets]
                contents, one, other = _both(*load_checkpoint(folder), format, crops, flip)
                figures = _difference(one, other, crops[:COMPARED], flip)
                _refuse_another_network(targets[0], format, figures)
                if everyone is not None:
                    figures |= _on_coco([one, other], first_people(everyone, people), settings)
                for part, content in zip(parts, contents, strict=True):
                    part.write_bytes(content)
        except OSError as error:
            why = error.strerror or one_line(error)
            raise CheckpointError(f"{targets[0]}: cannot be written ({why}). Name another file.") from None
    return Parity(targets[0], format, sum(map(len, contents)) / 2**20, **figures)


def _targets(checkpoint: str, out: str | None, format: FormatName) -> list[str]:
    """The files of a format: one, an .xml with its .bin, or ncnn's three. Paths or URIs."""
    from hrnet_core.checkpoint import INT8, NCNN, ONNX

    names = {"onnx": [ONNX], "openvino_int8": INT8, "ncnn": NCNN}
    if out is None:
        if format not in names:
            raise ConfigError(
                f"name the file to write, hrnet export {checkpoint} OUT --format {format}: no mode runs from "
                f"one, so it has no place in the checkpoint folder."
            )
        return [join(checkpoint, name) for name in names[format]]
    suffixes = [".xml", ".bin"] if format.startswith("openvino") else [".onnx"]
    if format == "ncnn":
        suffixes = [".ncnn.param", ".ncnn.bin", ".ncnn.json"]
    address, mark, query = out.partition("?") if is_uri(out) else (out, "", "")
    if not address.endswith(suffixes[0]):
        raise ConfigError(f"{out}: a file of format {format} ends in {suffixes[0]}.")
    return [f"{address.removesuffix(suffixes[0])}{suffix}{mark}{query}" for suffix in suffixes]


def _both(
    model: HRNet, spec: CheckpointSpec, format: FormatName, crops: NDArray[np.uint8], flip: bool
) -> tuple[Sequence[bytes], PosePredictor, PosePredictor]:
    """The content of the files, torch in float32, and who answers from that content."""
    from hrnet_core.checkpoint import INT8, NCNN, ONNX
    from hrnet_core.decoding_file import DecodedPredictor, export_decoding
    from hrnet_core.ncnn_file import export_ncnn
    from hrnet_core.onnx_file import export_float16, export_onnx
    from hrnet_core.openvino_file import export_int8, export_ir
    from hrnet_core.predictor import PosePredictor

    one = PosePredictor(model, spec, "cpu", "float32")
    if format == "onnx_decoded":
        content = export_decoding(model, spec, flip)
        return [content], one, DecodedPredictor(model, spec, content, format)
    if format.startswith("onnx"):
        content = (export_onnx if format == "onnx" else export_float16)(model, spec)
        return [content], one, PosePredictor(model, spec, "cpu", "onnx", {ONNX: content})
    if format == "ncnn":
        files = export_ncnn(model, spec)
        return files, one, PosePredictor(model, spec, "cpu", "ncnn", dict(zip(NCNN, files, strict=True)))
    pair = export_ir(model, spec) if format == "openvino" else export_int8(model, spec, crops)
    # This mode opens an .xml with its .bin, whatever the numbers in it are.
    return pair, one, PosePredictor(model, spec, "cpu", "openvino_int8", dict(zip(INT8, pair, strict=True)))


def _refuse_another_network(target: str, format: FormatName, figures: dict[str, Any]) -> None:
    """ConfigError where a file's answers are further from torch's than its format allows."""
    runtime, cell, keypoint = FORMATS[format]
    # NaN is not near either.
    if figures["cell"] <= cell * figures["spread"] and figures["keypoint_mean"] <= keypoint:
        return
    raise ConfigError(
        f"{target}: {runtime}'s answers differ by {figures['cell']:.3g} in a cell of heatmaps whose range is "
        f"{figures['spread']:.3g} (allowed {cell:g} of it), and by {figures['keypoint_mean']:.3g} px of the "
        f"crop in the mean keypoint (allowed {keypoint:g}): the file does not compute the same network. "
        f"Install the versions of constraints.txt; int8 may want other crops (--shards), or a network that "
        f"has learned more. Nothing was written."
    )


def shard_crops(shards: str | Path | None, split: str, spec: CheckpointSpec) -> NDArray[np.uint8]:
    """Crops uint8 (P, h, w, 3) of up to 300 people from all over a split of the shards, the plain views.

    ConfigError where no shards are named; DataError where theirs is another input size, or a file is damaged.
    """
    if shards is None:
        raise ConfigError(
            "int8 takes the ranges of its activations from crops of people: name the preprocessed shards, "
            "--shards SHARDS (what the network was trained on)."
        )
    manifest = Manifest.load(shards)
    size = tuple(manifest.recipe.settings.input_size)
    if size != spec.input_size:
        raise DataError(
            f"{shards}: crops of {size[0]} x {size[1]} px, the checkpoint's are {spec.input_size[0]} x "
            f"{spec.input_size[1]} px (width x height). Name shards of its input size."
        )
    if split not in manifest.splits:
        raise DataError(
            f"--shards-split {split}: {shards} has no split {split!r}; it has {', '.join(manifest.splits)}."
        )
    manifest.verify([split])
    groups = list(manifest.row_groups(split))
    some = groups[:: max(1, len(groups) // 16)]
    each = -(-CALIBRATION // len(some))
    tables = (read_row_group(manifest, split, *at, CROP_COLUMNS)[:each] for at in some)
    return np.concatenate([decode_rows(table, manifest)["images"] for table in tables])[:CALIBRATION]


def recorded_crops(folder: Path) -> NDArray[np.uint8]:
    """The self-test's crop, its mirror image, turned, and inverted: uint8 (4, h, w, 3)."""
    import safetensors.numpy

    from hrnet_core.checkpoint import SELFTEST

    crop = safetensors.numpy.load((folder / SELFTEST).read_bytes())["crops"][0]
    return np.stack([crop, crop[:, ::-1], crop[::-1, ::-1], 255 - crop])


def crop_px(
    spec: CheckpointSpec, one: NDArray[Any], other: NDArray[Any], boxes: NDArray[Any]
) -> NDArray[Any]:
    """Distances (P, K) of keypoints (P, K, 2) in photo px, in px of the crop that each box (P, 4) gives."""
    from hrnet_core.geometry import box_to_center_scale

    _, scale = box_to_center_scale(boxes, spec.input_size, spec.padding)
    return np.linalg.norm(one - other, axis=-1) * (spec.input_size[0] / scale[:, :1])


def _distances(px: NDArray[Any]) -> dict[str, Any]:
    return {
        "keypoint_mean": float(px.mean()),
        "keypoint_max": float(px.max()),
        "moved": int((px > 0.5).sum()),
    }


def _difference(
    one: PosePredictor, other: PosePredictor, crops: NDArray[np.uint8], flip: bool
) -> dict[str, Any]:
    truth = one.heatmaps(crops, flip)
    keypoints, scores = one.spec.codec.decode(truth)
    if "predict_crops" in vars(other):  # a decoded file has no heatmaps to show
        theirs, their_scores = other.predict_crops(crops)
        cell = np.abs(scores - their_scores).max()
    else:
        heatmaps = other.heatmaps(crops, flip)
        theirs = one.spec.codec.decode(heatmaps)[0]
        cell = np.abs(truth - heatmaps).max()
    return {
        "crops": len(crops),
        "cell": float(cell),
        "spread": float(np.ptp(truth)),
        **_distances(np.linalg.norm(keypoints - theirs, axis=-1)),
    }


def _on_coco(
    sides: Sequence[PosePredictor], some: EvaluationSet, settings: EvaluateSettings
) -> dict[str, Any]:
    """Keypoints and AP of both sides on some people."""
    asked, spec = some.asked, sides[0].spec
    answers = [_answers(some, side, settings) for side in sides]
    one, other = (a["keypoints"] for a in answers)
    aps = [
        score_poses(a["keypoints"], a["scores"], asked, some.split.truth, spec, settings)[0]["AP"]
        for a in answers
    ]
    distances = _distances(crop_px(spec, one, other, asked.bbox_xywh))
    return {"people": len(asked), **distances, "ap": tuple(aps)}


def first_people(everyone: EvaluationSet, count: int) -> EvaluationSet:
    """The first photographs whose people are `count` or more, and the ground truth of these alone."""
    photos = tuple(photo for photo, rows in everyone.photos if rows.start < count)
    of, truth = everyone.split, everyone.split.truth
    image_ids = np.array([photo.image_id for photo in photos], np.int64)
    people = on_photos(truth.people, photos)
    truth = replace(truth, image_ids=image_ids, people=people, crowd_index=None)
    split = replace(of, photos=photos, people=on_photos(of.people, photos), truth=truth)
    return replace(everyone, split=split, asked=on_photos(everyone.asked, photos))


def _answers(some: EvaluationSet, predictor: PosePredictor, settings: EvaluateSettings) -> NDArray[Any]:
    """Answers to all boxes, as evaluate's, photograph after photograph."""
    threads = Threads(predictor)
    outcomes = [answer(group, threads, settings) for group in group_photos(some, 1)]
    refuse_unusable([problem for outcome in outcomes for problem in outcome.problems])
    return read_answers((outcome.content for outcome in outcomes), some.asked)
