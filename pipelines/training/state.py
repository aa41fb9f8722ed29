"""What a worker of a training run holds, and how it is saved and restored."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.code_version import code_version
from pipelines.config import RunConfig, TrainSettings
from pipelines.metric_log import MetricLog
from pipelines.shards.manifest import Manifest
from pipelines.training.feed import Feed
from pipelines.training.validation import Validation

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hrnet_core.checkpoint import CheckpointSpec


@dataclass
class Progress:
    """Where a run stands; all of it goes into the checkpoint."""

    epoch: int = 0
    """Epochs that are through."""
    step: int = 0
    """Batches of the current epoch that are through."""
    total_steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_ap: float = -1.0
    best_epoch: int = 0


@dataclass(frozen=True)
class Place:
    """Which worker this is."""

    rank: int
    world: int
    device: torch.device


Report = Callable[[dict[str, Any], "str | None"], None]
"""Tell the rest of the system: figures, and rank 0's folder with trainer.pt, which it may take."""


@dataclass
class Training:
    """What one worker holds."""

    config: RunConfig
    manifest: Manifest
    folder: Path
    """STORAGE/NAME, the same for all workers."""
    place: Place
    report: Report
    model: nn.Module
    """The network itself, not the wrapper."""
    parallel: nn.Module
    """The network as it is called in training: under DDP where there are several workers."""
    optimizer: torch.optim.Optimizer
    feed: Feed
    spec: CheckpointSpec
    validation: Validation
    progress: Progress
    log: MetricLog | None
    """Rank 0 only."""
    saved: float = field(default_factory=time.monotonic)
    """The clock at the last checkpoint; `told`: at the last line inside an epoch, `drawn`: picture."""
    told: float = field(default_factory=time.monotonic)
    drawn: float = -math.inf


def set_up(
    job: dict[str, Any], place: Place, report: Report, checkpoint: str | Path | None = None
) -> Training:
    """Everything a worker holds; weights, optimizer and progress from `checkpoint` where there is one."""
    import cv2
    import torch

    config = RunConfig(**job["config"])
    settings, folder = config.train, Path(job["folder"])
    manifest = Manifest.load(job["shards"])
    # A reused process keeps another worker's number of threads.
    torch.set_num_threads(max(1, int(settings.cpus_per_worker)))
    cv2.setNumThreads(1)
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = True

    spec = make_spec(config, manifest, job["run_id"])
    model = make_model(config, spec).to(place.device)
    optimizer = make_optimizer(model, settings)
    progress = restore(checkpoint, model, optimizer) if checkpoint else Progress()
    log = None
    if place.rank == 0:
        log = MetricLog(folder / "metrics.jsonl", progress.total_steps, job["tracking_uri"], job["run_id"])
    return Training(
        config=config,
        manifest=manifest,
        folder=folder,
        place=place,
        report=report,
        model=model,
        parallel=wrap(model, place.device, place.world),
        optimizer=optimizer,
        feed=Feed(manifest, config.data.train_split, settings, place.rank, place.world),
        spec=spec,
        validation=Validation(manifest, config.data.val_split, place.rank, place.world),
        progress=progress,
        log=log,
    )


def make_spec(config: RunConfig, manifest: Manifest, run_id: str) -> CheckpointSpec:
    """What the checkpoints of this run say about themselves."""
    from hrnet_core.checkpoint import CheckpointSpec

    skeleton = manifest.skeleton()
    recipe = config.model_dump(mode="json", include={"data", "model", "train"})
    for place in ("root", "shards"):
        recipe["data"].pop(place)
    return CheckpointSpec(
        architecture=config.model.architecture(skeleton.num_keypoints),
        codec=manifest.codec(),
        skeleton=skeleton,
        padding=config.data.padding,
        flip_test=config.train.flip_test,
        provenance={
            "run_id": run_id,
            "dataset_digest": manifest.digest,
            "config": {"name": config.config_name, **recipe},
            "code_version": code_version(),
        },
    )


def make_model(config: RunConfig, spec: CheckpointSpec) -> nn.Module:
    import torch

    from hrnet_core.model import HRNet
    from hrnet_core.published import start_from

    model = HRNet(spec.architecture, config.model.initialization)
    if config.model.init:
        print(start_from(model, config.model.init))
    return model.to(memory_format=torch.channels_last) if config.train.channels_last else model


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    import torch

    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def wrap(model: nn.Module, device: torch.device, world: int) -> nn.Module:
    """DDP, gradients averaged. BatchNorm counts over each worker's own part, as the published runs did;
    its running statistics are rank 0's, sent to the others before validation instead of every step."""
    from torch.nn.parallel import DistributedDataParallel

    if world == 1:
        return model
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is 2.13's
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def restore(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Weights, optimizer and place from the trainer.pt that `save` wrote."""
    from hrnet_core.checkpoint import read_trainer_state

    state = read_trainer_state(folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def save(run: Training) -> None:
    """A checkpoint to go on from. All ranks call it together."""
    import torch

    from hrnet_core.checkpoint import TRAINER

    folder = None
    if run.place.rank == 0:
        folder = tempfile.mkdtemp(prefix="hrnet-")
        state = {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "progress": asdict(run.progress),
        }
        torch.save(state, Path(folder) / TRAINER)
    progress = run.progress
    run.report({"epoch": progress.epoch, "step": progress.total_steps, "best_ap": progress.best_ap}, folder)
    run.saved = time.monotonic()


def report_to_ray(figures: dict[str, Any], folder: str | None) -> None:
    """Ray Train's report: a barrier over the workers; the upload goes on while training does."""
    import ray.train

    ray.train.report(
        figures,
        ray.train.Checkpoint.from_directory(folder) if folder else None,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
