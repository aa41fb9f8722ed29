"""Reproduce: the published weights on COCO val2017 through our own chain, beside the published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hrnet_core.errors import ConfigError, DataError
from hrnet_core.locations import folder_to_write
from pipelines.evaluate import evaluate
from pipelines.import_weights import import_weights
from pipelines.poses.oks_ap import STATS
from pipelines.poses.protocol import Evaluation
from pipelines.settings.config import EvaluateSettings, RaySettings
from pipelines.settings.config_file import load_config
from pipelines.storage.files import is_file, join

SOURCE = "leoxiaobin/deep-high-resolution-net.pytorch"
"""Where README links the weights (model zoo, pose_coco) and the detector's file (data preparation)."""
BOXES = "COCO_val2017_detections_AP_H_56_person.json"
TOLERANCE = 0.002


@dataclass(frozen=True)
class Published:
    """A weights file of the paper's model zoo, and its figures."""

    file: str
    config: str
    """Name or file of the settings that describe it: codec, input size, skeleton."""
    stats: Mapping[str, float]
    """STATS by name, as published: COCO val2017, detector of AP 56.4, flip test."""


# README of SOURCE, "Results on COCO val2017": AP, AP50, AP75, APm, APl, AR, AR50, AR75, ARm, ARl.
FIGURES = {
    "w32_256x192": (0.744, 0.905, 0.819, 0.708, 0.810, 0.798, 0.942, 0.865, 0.757, 0.858),
    "w32_384x288": (0.758, 0.906, 0.825, 0.720, 0.827, 0.809, 0.943, 0.869, 0.767, 0.871),
    "w48_256x192": (0.751, 0.906, 0.822, 0.715, 0.818, 0.804, 0.943, 0.867, 0.762, 0.864),
    "w48_384x288": (0.763, 0.908, 0.829, 0.723, 0.834, 0.812, 0.942, 0.871, 0.767, 0.876),
}
PUBLISHED = {
    name: Published(f"pose_hrnet_{name}.pth", name, dict(zip(STATS, figures, strict=True)))
    for name, figures in FIGURES.items()
}


@dataclass(frozen=True)
class Reproduction:
    """Ours beside the published, model by model."""

    published: Mapping[str, Published]
    ours: Mapping[str, Evaluation]

    def agrees(self, model: str) -> bool:
        """Whether our AP is the published one."""
        difference = self.ours[model].stats["AP"] - self.published[model].stats["AP"]
        # The published figure has three digits: 1e-9 keeps .002 itself inside.
        return abs(difference) <= TOLERANCE + 1e-9

    @property
    def passed(self) -> bool:
        return all(self.agrees(model) for model in self.ours)

    def table(self) -> str:
        """All ten figures; the AP decides."""
        lines = [f"{'':<14}{'':<11}" + "".join(f"{name:>8}" for name in STATS)]
        for model, evaluation in self.ours.items():
            theirs, ours = self.published[model].stats, evaluation.stats
            lines += [
                f"{model:<14}{'published':<11}" + "".join(f"{theirs[n]:8.3f}" for n in STATS),
                f"{'':<14}{'ours':<11}" + "".join(f"{ours[n]:8.4f}" for n in STATS),
                f"{'':<14}{'difference':<11}"
                + "".join(f"{ours[n] - theirs[n]:+8.4f}" for n in STATS)
                + ("" if self.agrees(model) else f"   AP differs by more than {TOLERANCE:g}"),
            ]
        return "\n".join(lines)


def reproduce(
    coco_root: str | Path,
    weights_dir: str | Path,
    boxes: str | Path,
    *,
    models: Sequence[str] = (),
    out: str | Path = "runs/reproduce",
    settings: EvaluateSettings = EvaluateSettings(),
    ray: RaySettings = RaySettings(),
    published: Mapping[str, Published] = PUBLISHED,
) -> Reproduction:
    """Import each weights file (strictly), evaluate it with the detector's boxes, compare the AP.

    Protocol: preset official, flip test, float32, whatever `settings` says of them; its workers, batch and
    GPU are used. Writes OUT/MODEL/checkpoint and OUT/MODEL/evaluation, and prints each table as it comes. All
    places are paths or URIs.
    The caller looks at `passed`. ConfigError for a model there is not; DataError names every missing file.
    """
    chosen = list(models or published)
    unknown = [model for model in chosen if model not in published]
    if unknown:
        raise ConfigError(f"--models: no {', '.join(unknown)}; there are {', '.join(published)}.")
    out = folder_to_write(out, "--out")
    weights = {model: join(str(weights_dir), published[model].file) for model in chosen}
    _check_files(weights, str(boxes))
    protocol = {"preset": "official", "flip_test": True, "mode": "float32", "score_threshold": 0.0}
    settings = settings.model_copy(update=protocol)
    ours = {}
    for model in chosen:
        print(f"--- {model}: {published[model].file}", flush=True)
        data = load_config(published[model].config).data
        checkpoint, evaluation = (join(out, f"{model}/{what}") for what in ("checkpoint", "evaluation"))
        import_weights(weights[model], checkpoint, data.codec, data.input_size, data.skeleton, data.sigma)
        ours[model] = evaluate(checkpoint, coco_root, out=evaluation, boxes=boxes, settings=settings, ray=ray)
        print(ours[model].table(), flush=True)
    found = Reproduction(published, ours)
    print(found.table(), flush=True)
    return found


def _check_files(weights: Mapping[str, str], boxes: str) -> None:
    """DataError that lists what is missing: the file, what it is, and where it was published."""
    missing = [
        f"{file} (weights of {model}, in the model zoo of {SOURCE}, folder pose_coco)"
        for model, file in weights.items()
        if not is_file(file)
    ]
    if not is_file(boxes):
        missing.append(
            f"{boxes} (person detections of COCO val2017 with AP 56.4, {BOXES}, linked under data "
            f"preparation in the README of {SOURCE})"
        )
    if missing:
        raise DataError(
            f"{len(missing)} files are missing: {'; '.join(missing)}. Put them there, or name other places "
            f"with --weights-dir and --boxes; --models runs some of the models."
        )
