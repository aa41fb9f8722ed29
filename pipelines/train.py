"""Train: DDP on Ray Train over preprocessed shards, followed in MLflow, exact in going on.

This is the driver: it checks, opens the MLflow run (training/followed.py), starts the workers
(training/loop.py), and says what came out. One process of it, wherever the workers are. What a run leaves:
training/run_folder.py; what is said when something fails: docs/training.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core import memory
from hrnet_core.choices import Augmentation
from hrnet_core.errors import CheckpointError, ConfigError, DataError, Failure, PoseError, first_line
from hrnet_core.locations import open_folder
from pipelines.cluster.session import ray_session, require, selector
from pipelines.cluster.shared_paths import refuse_unshared
from pipelines.process.stop import begun, waited
from pipelines.settings.config import RunConfig
from pipelines.shards.manifest import Manifest
from pipelines.shards.recipe import Recipe
from pipelines.storage.files import absolute, base_name, join
from pipelines.tracking.store import store_of, uri_of
from pipelines.training.followed import NO_TAGS, Followed, closed_early, follow_run, hand_over
from pipelines.training.run_folder import (
    ERRORS,
    TrainResult,
    begin_run,
    check_same_run,
    keep_error,
    move_aside,
    no_room,
    only_one,
    refuse_sweep,
    refuse_to_move,
    run_folder,
    storage_of,
    where_it_stands,
    with_whole_weights,
)

if TYPE_CHECKING:
    import ray.train
    from ray.train import UserCallback
    from ray.train.torch import TorchTrainer

    from pipelines.training.state import Standing

RAY_TRAIN_DEFAULTS = {
    # report() waits for the controller's next look: 2 s by default, a tenth of a short run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # 60 s by default, which a busy machine needs for importing torch in every worker.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # Else every print of a worker appears twice, and what a library prints into a buffer too.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # A process that tells the loop that its node is about to go, which the loop does not ask.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Ray Train's own settings where the environment does not say otherwise."""


# --- the driver -----------------------------------------------------------------------------------


def train(config: RunConfig) -> TrainResult:
    """Train as `config` says; returns when the run is finished, at once if it already was.

    ConfigError, DataError and CheckpointError before anything starts: shards that are missing, damaged or
    made with other settings, weights to start from that do not fit, more workers than there are, a run name
    in use or of another configuration. Later: ConfigError where the loss stops being finite, DataError where
    a disk is full, Failure where workers were lost more than `train.max_failures` times, or for anything
    unexpected.
    """
    store_of(config.track, config.run.storage)
    manifest = Manifest.load(config.data.shards)
    check_settings(config, manifest)
    folder = run_folder(config, manifest.digest)
    with only_one(folder):
        refuse_sweep(folder)
        result = None
        if not config.run.fresh:
            check_same_run(folder, config, manifest.digest)
            result = TrainResult.read(folder)
        if result and result.version is not None:
            print(f"run {result.run_name} is finished: AP {result.best_ap:.3f}, {result.best_checkpoint}")
            return result
        if result is None:
            check_start(config, manifest)
            whole = begun_check(config, manifest)
            if config.run.fresh:
                refuse_moved_weights(config, folder)
                refuse_to_move(folder)
        with told_in_a_sentence(folder, epoch_steps(config, manifest), config.run.fresh):
            followed = None
            if result is None:  # else only MLflow has not got it yet
                result, followed = _train(config, manifest, folder, whole)
            result = hand_over(config, manifest, result, followed, add_onnx)
            result.write()
    registered = f", {config.track.registered_model}/{result.version}" if result.version else ""
    print(
        f"run {result.run_name}: best AP {result.best_ap:.3f} at epoch {result.best_epoch} "
        f"({result.samples} samples in {result.seconds:.0f} s), {result.best_checkpoint}{registered}"
    )
    return result


def _train(
    config: RunConfig, manifest: Manifest, folder: str, whole: Future[None]
) -> tuple[TrainResult, Followed | None]:
    """The run in its folder, by `fit` on a Ray that is started or joined for it."""
    settings = config.train
    with ray_session(config.ray, quiet=True, train=True):
        gpus = 1.0 if settings.use_gpu else 0.0
        require(config.ray, settings.num_workers, settings.cpus_per_worker, gpus, "hrnet train")
        refuse_unshared_run(config)
        if config.run.fresh:  # nothing else is wrong with the command
            move_aside(folder)
        return fit(config, manifest, folder, whole=whole)


def fit(
    config: RunConfig,
    manifest: Manifest,
    folder: str,
    tags: Mapping[str, str] = NO_TAGS,
    callbacks: Sequence[UserCallback] = (),
    whole: Future[None] | None = None,
) -> tuple[TrainResult, Followed | None]:
    """Train to the end on the Ray that is there, and say what came out, which MLflow has not got yet.

    The run in MLflow, with `tags` besides its own, is opened meanwhile: nobody asks for it before there are
    figures. callbacks: told of each report, in Ray Train's controller. whole: of `begun_check`; its DataError
    ends the run, which does not end without its result."""
    trainer = _trainer(config, manifest, folder, callbacks)
    begin_run(folder, config, manifest.digest)
    training = begun(trainer.fit)
    following = begun(functools.partial(follow_run, config, manifest, folder, tags))
    try:
        standing = _outcome(training, config, folder, epoch_steps(config, manifest), whole, following)
        if whole:
            end_check(whole)
        return _result(standing, folder, manifest), waited(following)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        closed_early(following, config, folder, status)
        raise


def add_onnx(checkpoint: Path) -> None:
    """model.onnx in a checkpoint folder, as `hrnet export` writes it."""
    from pipelines.export import export  # and evaluate with it: not before the first step

    export(checkpoint)


def refuse_moved_weights(config: RunConfig, folder: str) -> None:
    """ConfigError where the run is to start from the one that --run.fresh moves aside."""
    for flag, value in (("--model.init", config.model.init), ("--train.teacher", config.train.teacher)):
        if value and f"{absolute(value)}/".startswith(f"{folder}/"):
            raise ConfigError(
                f"{flag} {value}: lies in the run that --run.fresh moves aside. Give another --run.name in "
                f"place of --run.fresh."
            )


def refuse_unshared_run(config: RunConfig) -> None:
    """ConfigError on a cluster where a node that may get a worker has not got what a run reads and writes."""
    read = [("--data.shards", config.data.shards), ("--model.init", config.model.init)]
    refuse_unshared(
        [*read, ("--train.teacher", config.train.teacher)], [("--run.storage", config.run.storage)]
    )


def check_settings(config: RunConfig, manifest: Manifest) -> None:
    """ConfigError where the recipe asks for other data than the shards are, or for more than they have."""
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
    keypoints = manifest.recipe.skeleton.num_keypoints
    if config.train.ohkm > keypoints:
        raise ConfigError(
            f"train.ohkm {config.train.ohkm} keeps more keypoints than skeleton "
            f"{manifest.recipe.skeleton.name!r} has: at most {keypoints}, 0 for all."
        )


def check_start(config: RunConfig, manifest: Manifest) -> None:
    """CheckpointError, DataError where the weights that `model.init` names cannot be read or are of another
    network, ConfigError for such a `train.teacher`: told here, not by each worker again."""
    if config.train.teacher is not None:
        import torch

        from pipelines.training.state import make_spec, make_teacher

        try:
            make_teacher(config.train, make_spec(config, manifest), torch.device("cpu"))
        except (CheckpointError, DataError) as error:
            raise type(error)(
                f"train.teacher: {error} Correct --train.teacher, or leave it out to train without one."
            ) from None
    if config.model.init is None:
        return
    from hrnet_core.published import fit_weights, read_weights

    architecture = config.model.architecture(manifest.recipe.skeleton.num_keypoints)
    try:
        fit_weights(read_weights(config.model.init), architecture, new_head=True)
    except (CheckpointError, DataError) as error:
        raise type(error)(
            f"model.init: {error} Correct --model.init, or leave it out to start from scratch."
        ) from None


def begun_check(config: RunConfig, manifest: Manifest) -> Future[None]:
    """The hashing of all shards (`Manifest.verify`), which goes on beside the run: of a large dataset it
    would keep it from starting. DataError at once where a second shows it, as it does of small ones."""
    whole = begun(functools.partial(manifest.verify, {config.data.train_split, config.data.val_split}))
    wait([whole], 1.0)
    if whole.done():
        whole.result()
    return whole


def end_check(whole: Future[None]) -> None:
    """Returns when all shards are hashed. DataError of `begun_check`."""
    if not whole.done():
        print("waiting until all shards are checked ...", flush=True)
    waited(whole)


def epoch_steps(config: RunConfig, manifest: Manifest) -> int:
    """Batches of an epoch."""
    return -(-sum(manifest.row_groups(config.data.train_split).values()) // config.train.batch_size)


def _trainer(
    config: RunConfig, manifest: Manifest, folder: str, callbacks: Sequence[UserCallback]
) -> TorchTrainer:
    """Ray Train, before it begins. What comes before this needs no torch."""
    for name, value in RAY_TRAIN_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.faults import Faults
    from pipelines.training.loop import train_worker
    from pipelines.training.state import Job

    settings, steps = config.train, epoch_steps(config, manifest)
    uri = uri_of(config.track, storage_of(folder))
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {})
    files, place = open_folder(folder)
    work = functools.partial(train_worker, Job(with_whole_weights(config), manifest.folder, folder, uri))
    # The types that Ray ships are those of its first Train; what runs is the second.
    return TorchTrainer(
        work,  # type: ignore[arg-type]
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker=resources,
            label_selector=selector(config.ray),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=place,
            storage_filesystem=files,
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                settings.max_failures, controller_failure_limit=3
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            callbacks=[Faults(folder, steps, settings.max_failures), *callbacks],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": memory.KEPT},
        ),
    )


def _outcome(
    training: Future[ray.train.Result],
    config: RunConfig,
    folder: str,
    steps: int,
    *beside: Future[Any] | None,
) -> Standing:
    """Of the loop, once it is through. beside: what ends it where it fails."""
    import ray.train

    from pipelines.training.faults import what_happened
    from pipelines.training.loop import Diverged

    most = config.train.max_failures
    try:
        outcome = waited(training, *beside).return_value  # type: ignore[attr-defined]  # Train v2 has it
    except ray.train.WorkerGroupError as error:
        stands = where_it_stands(folder, steps, config.run.fresh)
        raise Failure(
            f"{what_happened(error.worker_failures)}, and train.max_failures {most} allows no further "
            f"restart. {stands} Details: {join(folder, ERRORS)}"
        ) from error
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, PoseError):
            raise error.controller_failure from None
        raise
    if isinstance(outcome, Diverged):
        raise outcome
    return outcome


def _result(standing: Standing, folder: str, manifest: Manifest) -> TrainResult:
    """What came out, not yet in MLflow's hands."""
    recipe = manifest.recipe
    return TrainResult(
        run_name=base_name(folder),
        run_id=None,
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
        best_checkpoint=join(folder, "best"),
        version=None,
    )


@contextlib.contextmanager
def told_in_a_sentence(folder: str, steps: int, fresh: bool = False) -> Iterator[None]:
    """What ends the block as a sentence that says where the run stands; tracebacks go into its errors.log.

    Stopped gets a note. DataError for a disk without room, Failure for all that is no error of the user's.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        with contextlib.suppress(Exception):  # a bucket that is away must not hide who stopped it
            error.add_note(f"{folder}: {where_it_stands(folder, steps, fresh)}")
        raise
    except PoseError:
        raise
    except Exception as error:
        if full := no_room(error, folder):
            raise full from None
        file = keep_error(folder, traceback.format_exc())
        if isinstance(error, Failure):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        stands = where_it_stands(folder, steps, fresh)
        raise Failure(f"{folder}: {what}. {stands} Details: {file}") from error
