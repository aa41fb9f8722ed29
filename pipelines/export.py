"""`hrnet export`: the network as an ONNX file, written only after ONNX Runtime gave the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.locations import here
from pipelines.checkpoints import is_folder_here, local_checkpoint
from pipelines.config import EvaluateSettings, TrackSettings
from pipelines.evaluate import answer, group_photos, read_answers
from pipelines.poses.protocol import score_poses
from pipelines.sources.evaluation_set import EvaluationSet, read_evaluation_set, refuse_unusable
from pipelines.sources.records import on_photos
from pipelines.storage import writing

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.predictor import PosePredictor

TOLERANCE = 1e-3
"""Of the heatmaps' range: what rounding in another order gives is about 1e-5."""


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from torch in float32, on the same crops."""

    file: Path
    crops: int
    heatmap: float
    """Largest absolute difference of a heatmap cell."""
    spread: float
    """The heatmaps' range, highest less lowest cell."""
    keypoint_mean: float
    """Distance of the decoded keypoints, crop px."""
    keypoint_max: float
    moved: int
    """Keypoints further than 0.5 crop px apart: elsewhere on the map two cells were equal up to rounding."""
    ap: tuple[float, float] | None = None
    """AP of the people of the crops: torch, ONNX Runtime. None without COCO."""

    def __str__(self) -> str:
        lines = [
            f"wrote {self.file} ({self.file.stat().st_size / 2**20:.1f} MiB)",
            f"ONNX Runtime against torch in float32, {self.crops} crops:",
            f"  heatmaps   largest difference {self.heatmap:.2e}, {self.heatmap / self.spread:.1e} of their "
            f"range",
            f"  keypoints  mean {self.keypoint_mean:.2e} px of the crop, largest {self.keypoint_max:.2e} px, "
            f"{self.moved} further than 0.5 px",
        ]
        if self.ap is None:
            lines.append("  AP         not compared: name a COCO folder with --coco")
        else:
            torch_ap, onnx_ap = self.ap
            difference = f"difference {onnx_ap - torch_ap:+.4f}, on {self.crops} people"
            lines.append(f"  AP         {torch_ap:.4f} and {onnx_ap:.4f}, {difference}")
        return "\n".join(lines)


def export(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    coco_root: str | Path | None = None,
    split: str = "val2017",
    boxes: str | Path | None = None,
    people: int = 200,
    settings: EvaluateSettings = EvaluateSettings(),
    track: TrackSettings = TrackSettings(),
    storage: str | Path = "runs",
) -> Parity:
    """Write the checkpoint's network as ONNX (onnx_file.export_onnx) and compare it with torch.

    out: default model.onnx in the checkpoint folder, where mode "onnx" finds it. coco_root: compare also on
    the first photographs that hold `people` people, with AP. Runs in this process.

    ConfigError: a package is missing, or ONNX Runtime's heatmaps differ by more than 1e-3 of their range (no
    file is left then). CheckpointError, DataError: as in evaluating.
    """
    from hrnet_core.checkpoint import ONNX, read_spec

    if out is None and not is_folder_here(checkpoint):
        raise ConfigError(
            f"name the file to write, hrnet export {checkpoint} OUT.onnx: only a checkpoint folder of this "
            f"machine is ours to add to."
        )
    file = None if out is None else here(out, "OUT")
    with local_checkpoint(checkpoint, track, storage) as found:
        folder = found.folder
        read_spec(folder)  # before a folder is made where there is none
        target = file or folder / ONNX
        try:
            with writing(target) as part:
                sides = _written(folder, part)
                figures = _difference(*sides, recorded_crops(folder))
                if figures["heatmap"] > TOLERANCE * figures["spread"]:
                    raise ConfigError(
                        f"{target}: ONNX Runtime's heatmaps differ by {figures['heatmap']:.3g}, their range "
                        f"is {figures['spread']:.3g}: these versions of onnx, onnxscript and onnxruntime do "
                        f"not compute the same network. Install those of constraints.txt. Nothing was "
                        f"written."
                    )
                if coco_root is not None:
                    everyone = read_evaluation_set(coco_root, split, boxes, settings, sides[0].spec.skeleton)
                    figures |= _on_coco(sides, first_people(everyone, people), settings)
        except OSError as error:
            reason = f"{target}: cannot be written ({error.strerror}). Name another file."
            raise CheckpointError(reason) from None
    return Parity(file=target, **figures)


def _written(folder: Path, file: Path) -> tuple[PosePredictor, PosePredictor]:
    """The checkpoint in torch's float32 and from `file`, which is written first."""
    from hrnet_core.checkpoint import load_checkpoint
    from hrnet_core.onnx_file import export_onnx
    from hrnet_core.predictor import PosePredictor

    model, spec = load_checkpoint(folder)
    file.write_bytes(export_onnx(model, spec))
    return PosePredictor(model, spec, "cpu", "float32"), PosePredictor(model, spec, "cpu", "onnx", file)


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


def _difference(one: PosePredictor, other: PosePredictor, crops: NDArray[np.uint8]) -> dict[str, Any]:
    a, b = one.heatmaps(crops), other.heatmaps(crops)
    keypoints = [one.spec.codec.decode(heatmaps)[0] for heatmaps in (a, b)]
    return {
        "crops": len(crops),
        "heatmap": float(np.abs(a - b).max()),
        "spread": float(a.max() - a.min()),
        **_distances(np.linalg.norm(keypoints[0] - keypoints[1], axis=-1)),
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
    return {"crops": len(asked), **distances, "ap": tuple(aps)}


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
    outcomes = [answer(group, predictor, settings) for group in group_photos(some, 1)]
    refuse_unusable([problem for outcome in outcomes for problem in outcome.problems])
    return read_answers((outcome.content for outcome in outcomes), some.asked)
