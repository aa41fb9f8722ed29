"""What a worker of a training run holds, and how it is made, saved and restored."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor, nn

from hrnet_core.checkpoint import (
    DESCRIPTION,
    SELFTEST,
    TRAINER,
    WEIGHTS,
    CheckpointSpec,
    read_trainer_state,
    save_checkpoint,
)
from hrnet_core.errors import ConfigError
from hrnet_core.locations import fetch, is_uri, open_folder
from hrnet_core.model import HRNet
from hrnet_core.modes import cannot_compile
from hrnet_core.predictor import PosePredictor
from hrnet_core.published import start_from
from pipelines.process.code_version import code_version
from pipelines.process.progress import Every
from pipelines.settings.config import RunConfig
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import answering, join, put_file, write_whole
from pipelines.tracking.metric_log import MetricLog
from pipelines.training.average import Average
from pipelines.training.batch import Sent
from pipelines.training.ddp import SharedGradients, wrap
from pipelines.training.epoch_ap import ValSplit
from pipelines.training.feed import Feed
from pipelines.training.run_folder import tracked_as
from pipelines.training.teacher import Teacher, load_teacher
from pipelines.training.usage import Usage


@dataclass(frozen=True)
class Job:
    """A run as the driver (pipelines/train.py) sends it to its workers."""

    config: RunConfig
    shards: str
    """Folder or URI of the dataset, absolute."""
    folder: str
    """STORAGE/NAME, path or URI, the same for all workers."""
    tracking_uri: str | None
    """MLflow's, that takes the metrics of the run that run.json names; None: they stay in `folder`."""


@dataclass
class Standing:
    """Where a run stands: all of it goes into the checkpoint, and at the end it is what came out."""

    epoch: int = 0
    """Epochs that are through."""
    step: int = 0
    """Batches of the current epoch that are through."""
    total_steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    """In the training loop, over all restarts."""
    best_ap: float = -1.0
    """val_gt/AP; rank 0 keeps it, and best_epoch."""
    best_epoch: int = 0
    skipped: int = 0
    """Steps that were left out, as their gradient was not finite; and how many of them came last."""
    skipped_in_a_row: int = 0
    risen_ap: float = -1.0
    """For `train.early_stop`: the AP that was above the one before by enough, and how many validations have
    passed since."""
    not_risen: int = 0
    stopped_early: bool = False


@dataclass
class Training:
    """What one worker holds."""

    config: RunConfig
    manifest: Manifest
    folder: str
    """STORAGE/NAME, path or URI, the same for all workers."""
    rank: int
    world: int
    """Number of workers."""
    device: torch.device
    report: Callable[[dict[str, Any], str | None], None]
    """As report_to_ray: takes figures, and rank 0's folder with trainer.pt, which is its to remove."""
    model: HRNet
    """The network itself, not the wrapper."""
    parallel: nn.Module
    """The network as it is called in training: under DDP where several workers launch their steps."""
    shared: SharedGradients | None
    """Of several workers that record them."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Of the loss in float16; does nothing in the other precisions."""
    average: Average | None
    """Of the weights, where `train.ema_decay` wants one."""
    teacher: Teacher | None
    """Of `train.teacher`."""
    mean: Tensor
    """(3,), `std` (3,) and `joint_weights` (K,) on the device: sent with each batch, the copy would be waited
    for, and with it the step before."""
    std: Tensor
    joint_weights: Tensor | None
    """None: all keypoints count alike."""
    grad_norm: Tensor
    """float32 () on the device: of the last step, always the same tensor, so that a recording writes it."""
    feed: Feed
    spec: CheckpointSpec
    val: ValSplit
    standing: Standing
    usage: Usage
    log: MetricLog | None
    """Rank 0 only."""
    full_step: Callable[[Sent], Tensor] | None = None
    """The step of full batches (step.prepare), from the first of them on."""
    predictor: PosePredictor | None = None
    """Of the AP of each epoch, from the first validation on."""
    saved_at: float = field(default_factory=time.monotonic)
    """The clock at the last checkpoint."""
    line_due: Every = field(default_factory=lambda: Every(30))
    send_due: Every = field(default_factory=lambda: Every(10, at_once=True))
    """Rows to MLflow within an epoch; at its end they are sent anyway."""
    pictures_due: Every = field(default_factory=lambda: Every(60, at_once=True))

    @functools.cached_property
    def run_id(self) -> str | None:
        """MLflow's, of rank 0, which waits for it here; None where MLflow is away."""
        return tracked_as(self.folder)

    def send(self) -> None:
        """What rank 0 has in its log to MLflow."""
        assert self.log is not None
        self.log.run_id = self.run_id
        self.log.flush()

    @property
    def scored(self) -> HRNet:
        """The network that is scored and saved for use."""
        return self.average.network if self.average else self.model


def set_up(
    job: Job,
    rank: int,
    world: int,
    device: torch.device,
    report: Callable[[dict[str, Any], str | None], None],
    checkpoint: str | Path | None = None,
) -> Training:
    """Everything that worker `rank` of `world` holds; weights, optimizer and standing from `checkpoint` where
    there is one. DataError, CheckpointError for shards or weights that it cannot read, ConfigError for
    settings that this machine cannot follow."""
    config, settings = job.config, job.config.train
    manifest = Manifest.load(job.shards)
    # A reused process keeps another worker's number of threads.
    torch.set_num_threads(max(1, int(settings.cpus_per_worker)))
    cv2.setNumThreads(1)
    torch.manual_seed(settings.seed)
    if settings.compile and (why := cannot_compile(device.type)):
        raise ConfigError(f"train.compile cannot be followed here: {why}.")

    spec = make_spec(config, manifest)
    model = make_model(config, spec, start=not checkpoint).to(device)
    weights = spec.skeleton.joint_weights if settings.joint_weights else None
    run = Training(
        config=config,
        manifest=manifest,
        folder=job.folder,
        rank=rank,
        world=world,
        device=device,
        report=report,
        model=model,
        parallel=model if settings.recorded else wrap(model, device, world),
        shared=SharedGradients(model, world) if settings.recorded and world > 1 else None,
        optimizer=make_optimizer(model, settings),
        scaler=make_scaler(settings, device),
        average=make_average(model, settings),
        teacher=make_teacher(settings, spec, device),
        mean=torch.tensor(spec.mean, device=device),
        std=torch.tensor(spec.std, device=device),
        joint_weights=torch.tensor(weights, device=device) if weights else None,
        grad_norm=torch.zeros((), device=device),
        feed=Feed(manifest, config.data.train_split, settings, rank, world),
        spec=spec,
        val=ValSplit(manifest, config.data.val_split, rank, world),
        standing=Standing(),
        usage=Usage(rank, device),
        log=None,
    )
    if checkpoint:
        restore(run, checkpoint)
    if rank == 0:
        steps = run.standing.total_steps
        run.log = MetricLog(join(job.folder, "metrics.jsonl"), steps, job.tracking_uri)
    return run


def make_spec(config: RunConfig, manifest: Manifest) -> CheckpointSpec:
    """What the checkpoints of this run say about themselves, but for MLflow's id (`keep_best`)."""
    skeleton = manifest.recipe.skeleton
    recipe = config.model_dump(
        mode="json", include={"data", "model", "train"}, exclude={"data": {"root", "shards"}}
    )
    return CheckpointSpec(
        architecture=config.model.architecture(skeleton.num_keypoints),
        codec=manifest.recipe.codec,
        skeleton=skeleton,
        padding=config.data.padding,
        flip_test=config.train.flip_test,
        weights="ema" if config.train.ema_decay else "raw",
        provenance={
            "run_id": None,
            "dataset_digest": manifest.digest,
            "config": {"name": config.config_name, **recipe},
            "code_version": code_version(),
        },
    )


def make_model(config: RunConfig, spec: CheckpointSpec, start: bool) -> HRNet:
    """start: with the weights of model.init, which a run that goes on needs no more."""
    model = HRNet(spec.architecture, config.model.initialization)
    if start and config.model.init:
        print(start_from(model, config.model.init))
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    return model


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Fused: it leaves out a step that is told not to be finite by itself. With `train.graph` its rate is a
    tensor on the device: a recording holds numbers, and reads tensors anew each time."""
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not settings.decay_norms:
        groups = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
    optimizer = kind(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    for group in optimizer.param_groups if settings.recorded else ():
        group |= {"lr": torch.tensor(settings.lr, device=parameters[0].device), "capturable": True}
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_scaler(settings: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")


def make_average(model: HRNet, settings: TrainSettings) -> Average | None:
    if not settings.ema_decay:
        return None
    # A decay that stays may be recorded as the number that it is.
    return Average(model, settings.ema_decay, recorded=settings.recorded and settings.ema_warmup)


def make_teacher(settings: TrainSettings, spec: CheckpointSpec, device: torch.device) -> Teacher | None:
    if settings.teacher is None:
        return None
    teacher = load_teacher(settings.teacher, settings.teacher_share, spec, device)
    if settings.channels_last:
        teacher.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as above
    return teacher


def restore(run: Training, folder: str | Path) -> None:
    """Weights, optimizer, scaler, average and standing from the trainer.pt that `save` wrote. ConfigError
    where the teacher is not the one that it was."""
    state = read_trainer_state(folder)
    if run.teacher and run.teacher.sha256 != state.get("teacher"):
        raise ConfigError(
            f"train.teacher: {run.config.train.teacher} holds other weights than when this run began. Put "
            f"those back, or begin another --run.name."
        )
    run.model.load_state_dict(state["model"])
    made = [(group["lr"], group["capturable"]) for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(state["optimizer"])
    for group, (rate, capturable) in zip(run.optimizer.param_groups, made, strict=True):
        group |= {"lr": rate, "capturable": capturable}  # of this start, recorded or not
    # An earlier version of this program saved neither of these, and a run that it began had neither.
    run.scaler.load_state_dict(state.get("scaler") or run.scaler.state_dict())
    if run.average:
        run.average.network.load_state_dict(state.get("average") or state["model"])
    run.standing = Standing(**state["progress"])


def save(run: Training) -> None:
    """A checkpoint to go on from. All ranks call it together."""
    folder, at = None, run.standing
    if run.rank == 0:
        folder = tempfile.mkdtemp(prefix="hrnet-")
        state = {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "average": run.average.network.state_dict() if run.average else None,
            "teacher": run.teacher.sha256 if run.teacher else None,
            "progress": asdict(at),
        }
        try:
            with removed_if_it_fails(folder), (Path(folder) / TRAINER).open("wb") as file:
                torch.save(state, file)  # by its name, torch hides that a disk is full
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        assert run.log is not None
        run.log.keep()
    run.report({"epoch": at.epoch, "step": at.total_steps, "best_ap": at.best_ap}, folder)
    run.saved_at = time.monotonic()


@contextlib.contextmanager
def removed_if_it_fails(folder: str) -> Iterator[None]:
    """A folder of a whole network's state does not stay in the temporary folder of a machine whose disk, or
    whose bucket, has failed: each attempt would leave one more."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keep_best(run: Training, ap: float, results: list[dict[str, Any]]) -> None:
    """best/ and predictions.json (COCO results) of the epoch just scored, whose AP is the best so far."""
    run.standing.best_ap, run.standing.best_epoch = ap, run.standing.epoch
    found = {"run_id": run.run_id, "epoch": run.standing.epoch, "val_gt/AP": ap}
    spec = replace(run.spec, provenance={**run.spec.provenance, **found})
    _put_checkpoint(join(run.folder, "best"), run.scored.state_dict(), spec)
    write_whole(join(run.folder, "predictions.json"), json.dumps(results) + "\n")


def _put_checkpoint(place: str, weights: dict[str, Tensor], spec: CheckpointSpec) -> None:
    """A checkpoint folder at a path or URI, as tracking/checkpoints.py puts one. An OSError stays one
    here: Ray Train then tries again."""
    if not is_uri(place):
        save_checkpoint(place, weights, spec)
        return
    with tempfile.TemporaryDirectory(prefix="hrnet-best-") as temporary:
        made = Path(temporary) / "best"
        save_checkpoint(made, weights, spec)
        for name in (WEIGHTS, SELFTEST, DESCRIPTION):
            put_file(made / name, join(place, name))


def report_to_ray(run_folder: str, figures: dict[str, Any], folder: str | None) -> None:
    """Ray Train's report: a barrier over the workers; the upload goes on while training does.

    Not uploaded by Ray, whose way loses the errors of a bucket and leaves a file without its end.
    """
    import ray.train

    def upload(saved: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        with removed_if_it_fails(saved.path):  # Ray removes it where that was done
            put_file(Path(saved.path) / TRAINER, join(run_folder, f"ray/{name}/{TRAINER}"))
        files, path = open_folder(join(run_folder, f"ray/{name}"))
        return ray.train.Checkpoint(path, files)

    ray.train.report(
        figures,
        ray.train.Checkpoint.from_directory(folder) if folder else None,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=True,
    )


@contextlib.contextmanager
def saved_by_ray(run_folder: str) -> Iterator[Path | None]:
    """The folder with trainer.pt from which training goes on, while the block lasts; None where it begins."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    place = join(run_folder, f"ray/{Path(checkpoint.path).name}")
    with tempfile.TemporaryDirectory(prefix="hrnet-resume-") as copy, answering(place):
        yield fetch(place, Path(copy), (TRAINER,))
