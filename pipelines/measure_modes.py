"""`hrnet evaluate CHECKPOINT COCO --measure-modes`: what each execution mode costs in AP, and how fast it is.

    float32 -> AP; each other mode -> AP, keypoints against float32's, speed and memory -> checkpoint.json

AP and keypoints come from whole evaluations on Ray Data: a mode is measured as it will be used. Speed is as
`hrnet benchmark` measures it. Mode "auto" decides by these figures (hrnet_core/modes.py).
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hrnet_core.choices import MODES
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.locations import fetch, folder_to_write, is_uri
from pipelines.cluster.session import ray_session
from pipelines.evaluate import evaluate
from pipelines.poses.protocol import Evaluation
from pipelines.poses.timing import Timings, processor, time_modes
from pipelines.settings.config import EvaluateSettings, RaySettings, TrackSettings
from pipelines.storage.files import join, put_file, read_file, writable
from pipelines.tracking.checkpoints import local_checkpoint
from pipelines.tracking.registry import REGISTERED

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

BATCH = 16
"""Batch size of ms_per_crop, by which "auto" decides."""


@dataclass(frozen=True)
class Measured:
    """Figures by mode, as they stand in checkpoint.json under the device; and what could not run here."""

    device: str
    figures: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    timings: Timings
    """The speeds again, with what was left out of them."""
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
        lines += ["", str(self.timings), "", f"mode auto on {self.device} is now {self.chosen}"]
        return "\n".join(lines)


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
    """Evaluate the checkpoint, a folder or a URI of one, in every mode that runs here and write the
    differences into its checkpoint.json, where that lies.

    Each mode's results go to `out`/MODE. Times and memory are measured in a Ray task with the CPUs and GPU of
    an evaluation's actor, the modes in turn. What "auto" decides by, `ms_per_crop`, is the fastest call of 16
    crops without flip test.

    ConfigError: a registered version instead of a folder: figures are written into it. CheckpointError: it
    was replaced meanwhile. CheckpointError, DataError: as in evaluating.
    """
    from hrnet_core.checkpoint import exported_names, read_spec
    from hrnet_core.modes import fastest_exact, unusable

    name, out = str(checkpoint), folder_to_write(out, "--out")
    if name.startswith(REGISTERED):
        raise ConfigError(
            f"{name} is a version of the registry, whose files stay as they are. Measure the checkpoint "
            f"folder (runs/NAME/best), and name the mode when you deploy (--serve.mode)."
        )
    device = settings.device
    wanted = dict.fromkeys(["float32", *modes])
    with local_checkpoint(name, TrackSettings(), "runs") as at_hand:
        measured = read_spec(at_hand.folder)  # before Ray starts
        exported = exported_names(at_hand.folder)
        left_out = {mode: why for mode in wanted if (why := unusable(mode, device, exported))}
        usable = [mode for mode in wanted if mode not in left_out]
        found: dict[str, Evaluation] = {}
        with ray_session(ray, quiet=True):
            for mode in usable:
                print(f"--- {mode}", flush=True)
                place, of_mode = join(out, mode), settings.model_copy(update={"mode": mode})
                found[mode] = evaluate(
                    name, coco_root, out=place, split=split, boxes=boxes, settings=of_mode, ray=ray
                )
            timings, measured_on = _timed_on_ray(at_hand.folder, usable, settings)
    left_out |= timings.left_out
    timings.left_out = {}
    for mode, speed in timings.modes.items():
        if BATCH not in speed.sizes:
            left_out[mode] = speed.left_out
    exact = found["float32"]
    figures = {
        mode: {
            "ap": of.stats["AP"],
            "ap_difference": of.stats["AP"] - exact.stats["AP"],
            **keypoint_differences(exact.results_file, of.results_file),
            **_speed(timings, mode, measured_on),
            "metric": exact.metric,
            "data_digest": exact.protocol["data_digest"],
            "people": exact.figures["people"],
            "flip_test": exact.protocol["flip_test"],
            "threads": settings.threads,
        }
        for mode, of in found.items()
        if mode not in left_out
    }
    spec = _record(name, measured, device, figures)
    return Measured(device, figures, left_out, timings, fastest_exact(spec.modes, device, exported))


def _record(
    checkpoint: str, measured: CheckpointSpec, device: str, figures: dict[str, Any]
) -> CheckpointSpec:
    """Write the figures into the checkpoint.json of a folder or URI, if these are still the weights that were
    measured: training may have put others there."""
    from hrnet_core.checkpoint import DESCRIPTION, read_spec, record_modes

    with tempfile.TemporaryDirectory(prefix="hrnet-described-") as copy, writable(checkpoint):
        folder = fetch(checkpoint, Path(copy), [DESCRIPTION])
        if read_spec(folder).weights_sha256 != measured.weights_sha256:
            raise CheckpointError(
                f"{checkpoint}: other weights lie there now than those that were measured, so nothing was "
                f"written. Measure again when training is through."
            )
        spec = record_modes(folder, device, figures)
        if is_uri(checkpoint):
            put_file(folder / DESCRIPTION, join(checkpoint, DESCRIPTION))
    return spec


def keypoint_differences(one: str | Path, other: str | Path) -> dict[str, Any]:
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


def _by_image(file: str | Path) -> dict[int, list[list[float]]]:
    """Keypoints of the people of each image: results are in order of their images."""
    groups = itertools.groupby(json.loads(read_file(str(file))), key=itemgetter("image_id"))
    return {image_id: [result["keypoints"] for result in results] for image_id, results in groups}


def _speed(timings: Timings, mode: str, measured_on: str) -> dict[str, Any]:
    """The fields of checkpoint.json that say how fast a mode is: what "auto" decides by, and all the rest."""
    speed = timings.modes[mode]
    fastest = {"ms_per_crop": speed.fastest(BATCH), "ms_per_crop_alone": speed.fastest(1)}
    return {**fastest, "measured_on": measured_on, "speed": speed.as_dict()}


def _timed_on_ray(checkpoint: Path, modes: Sequence[str], settings: EvaluateSettings) -> tuple[Timings, str]:
    import ray

    from hrnet_core.checkpoint import TRAINER

    # The task may run on another machine: the folder goes with it.
    files = {f.name: f.read_bytes() for f in checkpoint.iterdir() if f.is_file() and f.name != TRAINER}
    task = ray.remote(_time_files).options(
        num_cpus=settings.cpus_per_worker or 1, num_gpus=int(settings.use_gpu), max_retries=0
    )
    return ray.get(task.remote(files, modes, settings.device, settings.threads))


def _time_files(
    files: dict[str, bytes], modes: Sequence[str], device: str, threads: int
) -> tuple[Timings, str]:
    """The timings of a checkpoint folder with these files, and the processor they are of."""
    with tempfile.TemporaryDirectory(prefix="hrnet-measured-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return time_modes(folder, modes, device, threads, always=BATCH), processor(device)
