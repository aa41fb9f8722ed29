"""Train: DDP on Ray Train over preprocessed shards, followed in MLflow, exact in going on.

This is the driver: it checks, opens the MLflow run, starts the workers (training/loop.py), and hands
pictures and the best checkpoint to MLflow. One process of it, wherever the workers are.

STORAGE/NAME/ holds everything of a run: run.json and config.yaml (what it is), metrics.jsonl, best/,
pictures/, predictions.json, ray/ (Ray Train's own state), result.json (written last: the run is finished).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hrnet_core.choices import Augmentation
from hrnet_core.errors import ConfigError, PoseError
from hrnet_core.locations import without_credentials
from pipelines.cluster import ray_session, require
from pipelines.code_version import code_version
from pipelines.config import RunConfig
from pipelines.metric_log import MetricLog
from pipelines.registry import Registry
from pipelines.shards.manifest import Manifest
from pipelines.shards.recipe import Recipe
from pipelines.storage import write_json, write_whole
from pipelines.tracking import Tracker

if TYPE_CHECKING:
    from pipelines.training.state import Standing

RAY_TRAIN_DEFAULTS = {
    # report() waits for the controller's next look: 2 s by default, a tenth of a short run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # 60 s by default, which a busy machine needs for importing torch in every worker.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # Else every print of a worker appears twice, and what a library prints into a buffer too.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
"""Ray Train's own settings where the environment does not say otherwise."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run; the same stands in `folder`/result.json."""

    run_name: str
    run_id: str
    """MLflow's."""
    folder: Path
    """STORAGE/NAME."""
    best_ap: float
    """val_gt/AP: ground-truth boxes, from the shards."""
    best_epoch: int
    epochs: int
    step: int
    """Batches in all."""
    samples: int
    seconds: float
    """Time in the training loop, start-up not included."""
    dataset_digest: str
    codec: str
    input_size: str
    """WIDTHxHEIGHT."""
    best_checkpoint: Path
    version: int | None
    """Of the registered model; None where MLflow could not take it."""

    @classmethod
    def of(cls, standing: Standing, folder: Path, run_id: str, manifest: Manifest) -> TrainResult:
        """What came out, not yet in MLflow's hands."""
        recipe = manifest.recipe
        return cls(
            run_name=folder.name,
            run_id=run_id,
            folder=folder,
            best_ap=standing.best_ap,
            best_epoch=standing.best_epoch,
            epochs=standing.epoch,
            step=standing.total_steps,
            samples=standing.samples,
            seconds=round(standing.seconds, 1),
            dataset_digest=manifest.digest,
            codec=recipe.codec.name,
            input_size="x".join(map(str, recipe.settings.input_size)),
            best_checkpoint=folder / "best",
            version=None,
        )

    @classmethod
    def read(cls, folder: Path) -> TrainResult | None:
        """Of a run whose training is through; None where it is not."""
        fields = _read_json(folder / "result.json")
        return fields and cls(**{**fields, "folder": folder, "best_checkpoint": folder / "best"})

    def write(self) -> None:
        paths = {"folder": str(self.folder), "best_checkpoint": str(self.best_checkpoint)}
        write_json(self.folder / "result.json", {**asdict(self), **paths})


# --- the driver -----------------------------------------------------------------------------------


def train(config: RunConfig) -> TrainResult:
    """Train as `config` says; returns when the run is finished, at once if it already was.

    ConfigError and DataError before anything starts: shards that are missing, damaged or made with other
    settings, more workers than there are, a run name in use or of another configuration. ConfigError too
    where the loss stops being finite. A worker that dies is replaced `train.max_failures` times.
    """
    manifest = Manifest.load(config.data.shards)
    check_settings(config, manifest)
    name = config.run.name or config.identity(manifest.digest)
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"--run.name {name!r}: a run's name is a folder's name in --run.storage, no path.")
    folder = Path(config.run.storage).resolve() / name
    with _only_one(folder):
        if config.run.fresh:
            _move_aside(folder)
        _check_same_run(folder, config, manifest)
        result = TrainResult.read(folder)
        if result and result.version is not None:
            print(f"run {name} is finished: AP {result.best_ap:.3f}, {result.best_checkpoint}")
            return result
        manifest.verify({config.data.train_split, config.data.val_split})
        return _train(config, manifest, folder, result)


def _train(config: RunConfig, manifest: Manifest, folder: Path, result: TrainResult | None) -> TrainResult:
    """The run in its folder: MLflow, Ray, and what came out in result.json. result: where only MLflow has not
    got it yet."""
    settings = config.train
    with ray_session(config.ray):
        gpus = 1.0 if settings.use_gpu else 0.0
        require(config.ray, settings.num_workers, settings.cpus_per_worker, gpus, "hrnet train")
        tracker = Tracker(config.track, folder.parent)
        run_id = _open_run(tracker, config, manifest, folder)
        try:
            if result is None:
                standing = _fit(config, manifest, folder, tracker.uri, run_id)
                result = TrainResult.of(standing, folder, run_id, manifest)
        except BaseException as error:
            tracker.close_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    result = replace(result, run_id=run_id, version=_hand_over(tracker, run_id, result))
    tracker.close_run(run_id, "FAILED" if result.version is None else "FINISHED")
    result.write()
    print(
        f"run {result.run_name}: best AP {result.best_ap:.3f} at epoch {result.best_epoch} "
        f"({result.samples} samples in {result.seconds:.0f} s), {result.best_checkpoint}"
    )
    return result


def check_settings(config: RunConfig, manifest: Manifest) -> None:
    """ConfigError where the recipe asks for other data than the shards are."""
    wanted, have = Recipe.of(config.data).as_dict(), manifest.recipe.as_dict()
    views = Augmentation.__dataclass_fields__
    names = ("input_size", "codec", "sigma", "padding", "context", "variants", *views)
    differ = [
        f"data.{n} is {wanted[n]}, the shards have {have.get(n)}" for n in names if wanted[n] != have.get(n)
    ]
    if wanted["skeleton"] != have["skeleton"]:
        differ.append(
            f"data.skeleton is {wanted['skeleton']['name']!r}, the shards have {have['skeleton']['name']!r}"
            + (" of another content" if wanted["skeleton"]["name"] == have["skeleton"]["name"] else "")
        )
    if differ:
        raise ConfigError(
            f"{manifest.folder} was preprocessed with other settings: {'; '.join(differ)}. Give the same "
            f"settings, or preprocess into another folder with these."
        )
    if config.train.views == "device" and have["context"] == 1.0:
        raise ConfigError(
            f"train.views device makes each view from a cut of the photo around the person, and "
            f"{manifest.folder} has the crops of its stored views only. Preprocess with --data.context 2.0 "
            f"into another folder, or train with --train.views stored."
        )


def _open_run(tracker: Tracker, config: RunConfig, manifest: Manifest, folder: Path) -> str:
    """The id of the MLflow run, the earlier one where there is one, once run.json has it."""
    run_id = tracker.open_run(
        folder.name,
        config.model_dump(mode="json", exclude={"evaluate", "serve", "ray", "run"}),
        {
            "config": config.config_name,
            "dataset_digest": manifest.digest,
            "code_version": code_version(),
            "run_folder": str(folder),
        },
        {
            "source": manifest.folder,
            "digest": manifest.digest,
            "training": config.data.train_split,
            "validation": config.data.val_split,
        },
        (_read_json(folder / "run.json") or {}).get("run_id"),
    )
    _write_run(folder, config, manifest, run_id)
    return run_id


def _fit(config: RunConfig, manifest: Manifest, folder: Path, uri: str, run_id: str) -> Standing:
    """Ray Train until the loop is through. What comes before it needs no torch."""
    for name, value in RAY_TRAIN_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.loop import Diverged, train_worker
    from pipelines.training.state import Job

    settings = config.train
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {})
    trainer = TorchTrainer(
        functools.partial(train_worker, Job(config, manifest.folder, folder, uri, run_id)),
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers, use_gpu=settings.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(settings.max_failures, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            for cause in (failure, failure.__cause__, getattr(failure, "cause", None)):
                if isinstance(cause, PoseError):
                    raise cause from None
        raise
    if isinstance(outcome, Diverged):
        raise outcome
    return outcome


def _hand_over(tracker: Tracker, run_id: str, result: TrainResult) -> int | None:
    """Give MLflow what it has not got yet: rows, pictures, the version, whose number it is. None if it is
    away."""
    folder = result.folder
    try:
        if not MetricLog(folder / "metrics.jsonl", result.step, tracker.uri, run_id).flush(force=True):
            raise ConnectionError("metrics were not taken")
        tracker.log_files(run_id, [folder / "config.yaml", folder / "metrics.jsonl"])
        tracker.log_files(run_id, sorted((folder / "pictures").glob("*.png")), "pictures")
        tracker.log_files(run_id, [folder / "predictions.json"], "validation")
        tags = {
            "val_gt/AP": f"{result.best_ap:.4f}",
            "run_name": result.run_name,
            "dataset_digest": result.dataset_digest,
            "codec": result.codec,
            "input_size": result.input_size,
        }
        return Registry(tracker).register(run_id, result.best_checkpoint, tags)
    except Exception as error:
        why = without_credentials(str(error))
        print(
            f"MLflow {tracker.shown} did not take the results ({why}). The run is whole in {folder}; the "
            f"same command again sends them."
        )
        return None


# --- the run's folder -----------------------------------------------------------------------------


def _decides(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    return {"dataset_digest": manifest.digest, **config.decides()}


def _check_same_run(folder: Path, config: RunConfig, manifest: Manifest) -> None:
    """A name goes on only as what it was: ConfigError names what differs."""
    known = _read_json(folder / "run.json")
    if known is None:
        return
    now = _decides(config, manifest)
    differ = [f"{k} was {v}, now {now.get(k)}" for k, v in known["decides"].items() if now.get(k) != v]
    if differ:
        raise ConfigError(
            f"{folder}: this run was started with other settings: {'; '.join(differ)}. Choose another "
            f"--run.name (its weights can be the start: --model.init {folder / 'best'}), or --run.fresh to "
            f"move it aside."
        )


def _write_run(folder: Path, config: RunConfig, manifest: Manifest, run_id: str) -> None:
    write_json(folder / "run.json", {"run_id": run_id, "decides": _decides(config, manifest)})
    settings = yaml.safe_dump(config.model_dump(mode="json", exclude={"config_name"}), sort_keys=False)
    write_whole(
        folder / "config.yaml", f"# hrnet train {folder.name}: all settings, as they were\n{settings}"
    )


def _move_aside(folder: Path) -> None:
    """`name` becomes `name.1`, `name.2`, ...; the lock file stays where it is."""
    if not (folder / "run.json").exists():
        return
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    folder.mkdir()
    print(f"the earlier run {folder.name} is now {aside}")


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two drivers of one run would overwrite each other's state."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: another process is training this run. Wait for it, or give another --run.name."
            ) from None
        yield


def _read_json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None
