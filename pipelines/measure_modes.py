"""`hrnet evaluate CHECKPOINT COCO --measure-modes`: what each execution mode costs in AP, and how fast it is.

    float32 -> AP; each other mode -> AP, keypoints against float32's, ms per crop -> checkpoint.json

AP and keypoints come from whole evaluations on Ray Data: a mode is measured as it will be used. Mode "auto"
decides by these figures (hrnet_core/modes.py).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hrnet_core.choices import MODES
from hrnet_core.errors import ConfigError
from hrnet_core.locations import here
from pipelines.checkpoints import is_folder_here
from pipelines.cluster import ray_session
from pipelines.config import EvaluateSettings, RaySettings
from pipelines.evaluate import evaluate
from pipelines.poses.protocol import Evaluation

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.model import HRNet


BATCH = 16
ROUNDS = 3


@dataclass(frozen=True)
class Measured:
    """Figures by mode, as they stand in checkpoint.json under the device; and what could not run here."""

    device: str
    figures: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    chosen: str
    """What "auto" is from now on, on such a device."""

    def __str__(self) -> str:
        lines = [
            f"{'mode':<18}{'AP':>8}{'difference':>12}{'keypoints: mean px':>20}{'largest':>9}"
            f"{'ms/crop':>9}{'alone':>8}"
        ]
        for mode, f in self.figures.items():
            lines.append(
                f"{mode:<18}{f['ap']:8.4f}{f['ap_difference']:+12.4f}{f['keypoint_px_mean']:20.4f}"
                f"{f['keypoint_px_max']:9.2f}{f['ms_per_crop']:9.1f}{f['ms_per_crop_alone']:8.1f}"
            )
        lines += [f"{mode:<18}not measured: {why}" for mode, why in self.left_out.items()]
        return "\n".join([*lines, f"mode auto on {self.device} is now {self.chosen}"])


def measure_modes(
    checkpoint: str | Path,
    coco_root: str | Path,
    *,
    modes: Sequence[str] = MODES,
    out: str | Path,
    split: str = "val2017",
    boxes: str | Path | None = None,
    settings: EvaluateSettings = EvaluateSettings(),
    ray: RaySettings = RaySettings(),
) -> Measured:
    """Evaluate the checkpoint in every mode that runs here and write the differences into checkpoint.json.

    Each mode's results go to `out`/MODE. ms per crop is one forward pass without the mirror image, in batches
    of 16 and alone, in a Ray task with the CPUs and GPU of an evaluation's actor, the modes in turn.

    ConfigError: a registered version or a URI instead of a folder: figures are written into it.
    CheckpointError, DataError: as in evaluating.
    """
    from hrnet_core.checkpoint import read_spec, record_modes
    from hrnet_core.modes import fastest_exact, unusable

    out = here(out, "--out")
    if not is_folder_here(checkpoint):
        raise ConfigError(
            f"{checkpoint} is no folder of this machine, and files of the registry stay as they are. Measure "
            f"the checkpoint folder (runs/NAME/best), and name the mode when you deploy (--serve.mode)."
        )
    device = settings.device
    wanted = dict.fromkeys(["float32", *modes])
    left_out = {mode: why for mode in wanted if (why := unusable(mode, device))}
    usable = [mode for mode in wanted if mode not in left_out]
    read_spec(checkpoint)  # before Ray starts
    found: dict[str, Evaluation] = {}
    with ray_session(ray, quiet=True):
        for mode in usable:
            print(f"--- {mode}", flush=True)
            place, of_mode = out / mode, settings.model_copy(update={"mode": mode})
            found[mode] = evaluate(
                checkpoint, coco_root, out=place, split=split, boxes=boxes, settings=of_mode, ray=ray
            )
        speeds = _timed_on_ray(Path(checkpoint), usable, settings)
    exact = found["float32"]
    figures = {
        mode: {
            "ap": of.stats["AP"],
            "ap_difference": of.stats["AP"] - exact.stats["AP"],
            **keypoint_differences(exact.results_file, of.results_file),
            **speeds[mode],
            "metric": exact.metric,
            "data_digest": exact.protocol["data_digest"],
            "people": exact.figures["people"],
            "flip_test": exact.protocol["flip_test"],
            "threads": settings.cpus_per_worker,
        }
        for mode, of in found.items()
    }
    spec = record_modes(checkpoint, device, figures)
    return Measured(device, figures, left_out, fastest_exact(spec.modes, device))


def keypoint_differences(one: Path, other: Path) -> dict[str, Any]:
    """Distances in photo px between two results files of the same boxes: mean, largest, and how many people
    were compared. Photographs where OKS-NMS kept another number of people are left out of it."""
    first, second = _by_image(one), _by_image(other)
    distances = []
    for image_id, people in first.items():
        if len(people) == len(second.get(image_id, ())):
            a, b = (np.array(p).reshape(len(p), -1, 3)[..., :2] for p in (people, second[image_id]))
            distances.append(np.linalg.norm(a - b, axis=-1))
    every = np.concatenate(distances) if distances else np.zeros((0, 1))
    return {
        "keypoint_px_mean": float(every.mean()) if every.size else 0.0,
        "keypoint_px_max": float(every.max()) if every.size else 0.0,
        "people_compared": len(every),
    }


def _by_image(file: Path) -> dict[int, list[list[float]]]:
    """Keypoints of the people of each image: results are in order of their images."""
    groups = itertools.groupby(json.loads(file.read_text()), key=itemgetter("image_id"))
    return {image_id: [result["keypoints"] for result in results] for image_id, results in groups}


def _timed_on_ray(
    checkpoint: Path, modes: Sequence[str], settings: EvaluateSettings
) -> dict[str, dict[str, Any]]:
    import ray

    from hrnet_core.checkpoint import load_checkpoint

    model, spec = load_checkpoint(checkpoint)
    task = ray.remote(time_modes).options(
        num_cpus=settings.cpus_per_worker, num_gpus=int(settings.use_gpu), max_retries=0
    )
    device = settings.device
    return ray.get(task.remote(model, spec, modes, device, settings.cpus_per_worker))


def time_modes(
    model: HRNet, spec: CheckpointSpec, modes: Sequence[str], device: str, threads: int
) -> dict[str, dict[str, Any]]:
    """Mode -> ms_per_crop (batches of 16), ms_per_crop_alone (of one), and the processor. The fastest of some
    rounds through all modes, so that other work on the machine does not meet one mode alone."""
    import torch

    from hrnet_core.predictor import PosePredictor

    torch.set_num_threads(threads)
    width, height = spec.input_size
    crops = np.random.default_rng(0).integers(0, 256, (BATCH, height, width, 3), dtype=np.uint8)
    predictors = {mode: PosePredictor(model, spec, device, mode) for mode in modes}
    for predictor in predictors.values():
        predictor.warm_up()
    best = dict.fromkeys(itertools.product(modes, (BATCH, 1)), np.inf)
    for _ in range(ROUNDS):
        for mode, count in best:
            start = time.perf_counter()
            predictors[mode].heatmaps(crops[:count], flip_test=False, batch_size=count)
            took = (time.perf_counter() - start) * 1000 / count
            best[mode, count] = min(took, best[mode, count])
    cpu = torch.cpu.get_capabilities().get("cpu_name", "?")
    on = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {
        mode: {"ms_per_crop": best[mode, BATCH], "ms_per_crop_alone": best[mode, 1], "measured_on": on}
        for mode in modes
    }
