"""Train: DDP on Ray Train over preprocessed shards, followed in MLflow, exact in going on.

This is the driver: it checks, opens the MLflow run, starts the workers (train_worker.py), and hands
pictures and the best checkpoint to MLflow. One process of it, wherever the workers are.

STORAGE/NAME/ holds everything of a run: run.json and config.yaml (what it is), metrics.jsonl, best/,
pictures/, predictions.json, ray/ (Ray Train's own state), result.json (written last: the run is finished).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrnet_core.errors import ConfigError, DataError, PoseError
from pipelines.cluster import ray_session, require
from pipelines.code_version import code_version
from pipelines.config import RunConfig
from pipelines.metric_log import MetricLog
from pipelines.registry import Registry
from pipelines.shards.manifest import Manifest
from pipelines.shards.recipe import Recipe
from pipelines.tracking import Tracker

AUGMENTATION = ("scale_factor", "rotation_factor", "half_body_probability", "flip_probability")

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
    """A finished run."""

    run_name: str
    run_id: str
    """MLflow's."""
    folder: Path
    """STORAGE/NAME."""
    best_checkpoint: Path
    best_ap: float
    """val_gt/AP: ground-truth boxes, from the shards."""
    best_epoch: int
    epochs: int
    samples: int
    seconds: float
    """Time in the training loop, start-up not included."""
    version: int | None
    """Of the registered model; None where MLflow could not take it."""
    already_finished: bool = False


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
        finished = _read_json(folder / "result.json")
        if finished and finished["version"] is not None:
            print(f"run {name} is finished: AP {finished['best_ap']:.3f}, {finished['best_checkpoint']}")
            return _result(finished, already_finished=True)
        manifest.verify({config.data.train_split, config.data.val_split})
        return _train(config, manifest, name, folder)


def _train(config: RunConfig, manifest: Manifest, name: str, folder: Path) -> TrainResult:
    """The run in its folder: MLflow, Ray, and the outcome in result.json."""
    settings = config.train
    with ray_session(config.ray):
        gpus = 1.0 if settings.use_gpu else 0.0
        require(config.ray, settings.num_workers, settings.cpus_per_worker, gpus, "hrnet train")
        tracker = Tracker(config.track, folder.parent)
        known = _read_json(folder / "run.json") or {}
        run_id = tracker.open_run(
            name,
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
            known.get("run_id"),
        )
        _write_run(folder, config, manifest, run_id)
        try:
            outcome = _read_json(folder / "result.json") or _fit(
                config, manifest, folder, tracker.uri, run_id
            )
        except BaseException as error:
            tracker.close_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    outcome = {"run_name": name, "run_id": run_id, "folder": str(folder), **outcome}
    outcome["best_checkpoint"] = str(folder / "best")
    outcome["version"] = _hand_over(tracker, run_id, folder, outcome)
    _write_json(folder / "result.json", outcome)
    print(
        f"run {name}: best AP {outcome['best_ap']:.3f} at epoch {outcome['best_epoch']} "
        f"({outcome['samples']} samples in {outcome['seconds']:.0f} s), {outcome['best_checkpoint']}"
    )
    return _result(outcome)


def check_settings(config: RunConfig, manifest: Manifest) -> None:
    """ConfigError where the recipe asks for other data than the shards are; DataError for no people."""
    wanted, have = Recipe.of(config.data).as_dict(), manifest.recipe.as_dict()
    names = ("input_size", "codec", "sigma", "padding", "context", "variants", *AUGMENTATION)
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
    for split in (config.data.train_split, config.data.val_split):
        if manifest.people(split) == 0:
            raise DataError(f"{manifest.folder}: split {split!r} has no people; hrnet inspect shows why.")


def _fit(
    config: RunConfig, manifest: Manifest, folder: Path, tracking_uri: str, run_id: str
) -> dict[str, Any]:
    """Ray Train until the loop is through; what rank 0 returned."""
    for name, value in RAY_TRAIN_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig, WorkerGroupError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.loop import train_worker

    settings = config.train
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "shards": manifest.folder,
            "folder": str(folder),
            "tracking_uri": tracking_uri,
            "run_id": run_id,
        },
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={
                "CPU": settings.cpus_per_worker,
                **({"GPU": 1} if settings.use_gpu else {}),
            },
        ),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=settings.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        outcome: dict[str, Any] = trainer.fit().return_value
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            for cause in (failure, failure.__cause__, getattr(failure, "cause", None)):
                if isinstance(cause, PoseError):
                    raise cause from None
        raise
    if "diverged" in outcome:
        raise ConfigError(outcome["diverged"])
    return outcome


def _hand_over(tracker: Tracker, run_id: str, folder: Path, outcome: dict[str, Any]) -> int | None:
    """Give MLflow what it has not got yet: rows, pictures, the version. None if it is away."""
    try:
        last = outcome["step"]
        if not MetricLog(folder / "metrics.jsonl", last, tracker.uri, run_id).flush(force=True):
            raise ConnectionError("metrics were not taken")
        tracker.log_files(run_id, [folder / "config.yaml", folder / "metrics.jsonl"])
        tracker.log_files(run_id, sorted((folder / "pictures").glob("*.png")), "pictures")
        tracker.log_files(run_id, [folder / "predictions.json"], "validation")
        tags = {
            "val_gt/AP": f"{outcome['best_ap']:.4f}",
            "run_name": outcome["run_name"],
            **{key: outcome[key] for key in ("dataset_digest", "codec", "input_size")},
        }
        version = Registry(tracker).register(run_id, folder / "best", tags)
    except Exception as error:
        print(
            f"MLflow {tracker.shown} did not take the results ({error}). The run is whole in {folder}; the "
            f"same command again sends them."
        )
        tracker.close_run(run_id, "FAILED")
        return None
    tracker.close_run(run_id, "FINISHED")
    return version


def _check_same_run(folder: Path, config: RunConfig, manifest: Manifest) -> None:
    """A name goes on only as what it was: ConfigError names what differs."""
    known = _read_json(folder / "run.json")
    if known is None:
        return
    now = {"dataset_digest": manifest.digest, **config.decides()}
    differ = [f"{k} was {v}, now {now.get(k)}" for k, v in known["decides"].items() if now.get(k) != v]
    if differ:
        raise ConfigError(
            f"{folder}: this run was started with other settings: {'; '.join(differ)}. Choose another "
            f"--run.name (its weights can be the start: --model.init {folder / 'best'}), or --run.fresh to "
            f"move it aside."
        )


def _write_run(folder: Path, config: RunConfig, manifest: Manifest, run_id: str) -> None:
    import yaml

    decides = {"dataset_digest": manifest.digest, **config.decides()}
    _write_json(folder / "run.json", {"run_id": run_id, "decides": decides})
    text = f"# hrnet train {folder.name}: all settings, as they were\n" + yaml.safe_dump(
        config.model_dump(mode="json", exclude={"config_name"}), sort_keys=False
    )
    (folder / "config.yaml").write_text(text)


def _move_aside(folder: Path) -> None:
    """`name` becomes `name.1`, `name.2`, ...; the lock file stays where it is."""
    if not (folder / "run.json").exists():
        return
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    aside = folder.with_name(f"{folder.name}.{number}")
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


def _result(outcome: dict[str, Any], already_finished: bool = False) -> TrainResult:
    fields = {name: outcome[name] for name in TrainResult.__dataclass_fields__ if name in outcome}
    fields |= {name: Path(fields[name]) for name in ("folder", "best_checkpoint")}
    return TrainResult(**fields, already_finished=already_finished)


def _read_json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)
