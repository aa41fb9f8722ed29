"""MLflow: the only module that imports it (beside mlflow_model.py, which MLflow itself loads).

The driver of `hrnet train` owns one run: it opens it, ends it FINISHED or FAILED, and registers the best
checkpoint. Rank 0 of the workers writes metrics through a MetricLog with the run's id: first to a JSONL
file in the run folder, then to MLflow in batches, never a step twice. If the server goes away, training
goes on and the file is replayed at the end. Not covered: a server that is away when the run is opened
(an error, nothing is trained), and one that is still away at the end (the file stays; asking for the same
run again sends it).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core.errors import CheckpointError, ConfigError
from pipelines.cluster import on_cluster
from pipelines.code_version import code_version
from pipelines.config import TrackSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion


log = logging.getLogger("hrnet.tracking")
CHAMPION = "champion"
PROTOCOL = ("data_digest", "boxes", "flip_test", "preset")
"""What must be equal before two APs are compared (docs/contracts.md)."""
DIGITS = 36
"""MLflow's limit for the digest of a dataset: the run's tag dataset_digest has all 64."""
EVALUATION = "evaluation."
"""Prefix of a version's tags that hold an evaluation: JSON {"protocol", "stats"}."""


class Tracker:
    """The tracking store of these settings: runs, the model registry, champion.

    `storage` is the folder that holds mlflow.db and its artifacts where neither `track.uri` nor
    MLFLOW_TRACKING_URI names a server. ConfigError on a cluster without one (workers of other machines
    could not reach the file), and where the store does not answer.
    """

    def __init__(self, settings: TrackSettings, storage: str | Path) -> None:
        self.settings = settings
        self.storage = Path(storage).resolve()
        named = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not named and on_cluster():
            raise ConfigError(
                "MLFLOW_TRACKING_URI is not set, and RAY_ADDRESS names a cluster: its machines cannot share "
                "a SQLite file. Start a server (infra/ has one) and set MLFLOW_TRACKING_URI in the job's "
                "environment, or pass --track.uri."
            )
        self.local = not named
        self.uri = named or f"sqlite:///{self.storage / 'mlflow.db'}"
        with quiet():
            self.client = self._connect()

    def _connect(self) -> MlflowClient:
        import mlflow

        # Processes that create the tables at the same time break the file for good: one after the other.
        lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.local:
            self.storage.mkdir(parents=True, exist_ok=True)
            lock = _locked(self.storage / "mlflow.db.lock")
        try:
            with lock:
                self._select()
                client = mlflow.MlflowClient(self.uri, self.uri)
                client.search_experiments(max_results=1)
        except Exception as error:
            raise ConfigError(
                f"the MLflow store {self.uri} does not answer ({error}). Start the server, or correct "
                f"--track.uri / MLFLOW_TRACKING_URI; without either, SQLite in --run.storage is used."
            ) from error
        return client

    def _select(self) -> None:
        """This store for MLflow's functions that take none."""
        import mlflow

        named = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        # It also sets the variable, which the next Tracker would take for the user's wish.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if named is not None:
            os.environ["MLFLOW_TRACKING_URI"] = named

    # --- the run ------------------------------------------------------------------------------

    def open_run(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        dataset: Mapping[str, str],
        run_id: str | None = None,
    ) -> str:
        """The id of a run in state RUNNING: `run_id` opened again if it is still there, else a new one.

        dataset: {"source", "digest", "training", "validation"}: the last two are names of splits, each
        logged as an input of that context.
        """
        import mlflow

        with quiet():
            if run_id is not None:
                with contextlib.suppress(mlflow.MlflowException):
                    if self.client.get_run(run_id).info.lifecycle_stage == "active":
                        self.client.update_run(run_id, status="RUNNING")
                        return run_id
            run_id = self.new_run(name, tags)
            pairs = [(context, dataset[context]) for context in ("training", "validation")]
            self.log_dataset(run_id, dataset["source"], dataset["digest"], pairs)
            self.log_params(run_id, params)
            return run_id

    def new_run(self, name: str, tags: Mapping[str, str]) -> str:
        return str(self.client.create_run(self._experiment(), run_name=name, tags=dict(tags)).info.run_id)

    def log_dataset(self, run_id: str, source: str, digest: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Splits of a dataset as inputs of a run: (context, split)."""
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        for context, split in pairs:
            entity = MetaDataset(resolve_dataset_source(source), split, digest[:DIGITS])._to_mlflow_entity()
            self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:6000]) for key, value in flatten(params).items()]
        for start in range(0, len(rows), 100):
            self.client.log_batch(run_id, params=rows[start : start + 100])

    def runs_on(self, digest: str) -> list[Run]:
        """All runs of the experiment that have the dataset of this digest as an input, newest first."""
        with quiet():
            found = self.client.search_runs([self._experiment()], f"dataset.digest = '{digest[:DIGITS]}'")
            return [run for run in found if run.data.tags.get("dataset_digest") == digest]

    def close_run(self, run_id: str, status: str) -> None:
        """End the run: "FINISHED", "FAILED" or "KILLED". A store that is away is only reported."""
        try:
            self.client.set_terminated(run_id, status)
        except Exception as error:
            log.warning("MLflow %s: run %s could not be ended as %s: %s", self.uri, run_id, status, error)

    def log_files(self, run_id: str, files: Iterable[Path], folder: str | None = None) -> None:
        for file in files:
            self.client.log_artifact(run_id, str(file), folder)

    def _experiment(self) -> str:
        import mlflow

        name = self.settings.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        place = (self.storage / "mlartifacts").as_uri() if self.local else None
        try:
            # Without it MLflow's page opens in its view for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(name, artifact_location=place, tags=kind))
        except mlflow.MlflowException:  # another driver was faster
            return str(self.client.get_experiment_by_name(name).experiment_id)

    # --- the registry -------------------------------------------------------------------------

    def register(self, run_id: str, checkpoint: Path, tags: Mapping[str, str]) -> int:
        """The checkpoint folder as a new version of the registered model; its number.

        Stored as models-from-code (mlflow_model.py) over the folder and the hrnet_core package: no pickle.
        """
        import mlflow

        import hrnet_core

        self._select()
        with quiet():
            with mlflow.start_run(run_id=run_id):
                info = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).with_name("mlflow_model.py")),
                    artifacts={"checkpoint": str(checkpoint)},
                    code_paths=[str(Path(hrnet_core.__file__).parent)],
                    pip_requirements=["torch", "numpy", "opencv-python-headless", "safetensors", "Pillow"],
                )
            # start_run's end says FINISHED; the owner of the run decides that.
            self.client.update_run(run_id, status="RUNNING")
            version = mlflow.register_model(
                info.model_uri,
                self.settings.registered_model,
                tags={"weights_sha256": _sha256(checkpoint), **tags},
            )
        return int(version.version)

    def version(self, model_ref: str | None) -> ModelVersion | None:
        """The registered version of "models:/name@alias", "models:/name/3", "3", a checkpoint folder that
        was registered, or (None) the newest. None where there is none."""
        name = self.settings.registered_model
        with quiet(), _absent_is_none():
            if model_ref is None:
                return max(self._versions(), key=lambda v: int(v.version), default=None)
            if model_ref.isdecimal():
                return self.client.get_model_version(name, model_ref)
            if model_ref.startswith("models:/"):
                name, separator, which = model_ref.removeprefix("models:/").rpartition("@")
                if separator:
                    return self.client.get_model_version_by_alias(name, which)
                name, _, which = model_ref.removeprefix("models:/").rpartition("/")
                return self.client.get_model_version(name, which)
            same = f"tag.weights_sha256='{_sha256(Path(model_ref))}'"
            return max(self._versions(same), key=lambda v: int(v.version), default=None)
        return None

    def _versions(self, condition: str | None = None) -> list[ModelVersion]:
        query = f"name='{self.settings.registered_model}'" + (f" and {condition}" if condition else "")
        return list(self.client.search_model_versions(query, max_results=10_000))

    def champion(self) -> ModelVersion | None:
        return self.version(f"models:/{self.settings.registered_model}@{CHAMPION}")

    def set_champion(self, version: ModelVersion) -> None:
        """Move the alias; the version that had it stands in the tag previous_champion."""
        old = self.champion()
        name = self.settings.registered_model
        if old is not None and old.version != version.version:
            self.client.set_registered_model_tag(name, "previous_champion", str(old.version))
        self.client.set_registered_model_alias(name, CHAMPION, str(version.version))


def record_evaluation(
    model_ref: str,
    stats: Mapping[str, float],
    protocol: Mapping[str, Any],
    artifacts: Sequence[str | Path] = (),
    *,
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
) -> str | None:
    """Write an evaluation to the registered version that `model_ref` is, and to its run.

    stats: "AP", "AP50", ... as fractions. protocol: data_digest, boxes ("gt", or "det" with whatever
    identifies the boxes), flip_test, preset, and more if wanted; only those four decide whether two APs
    are compared. Metrics become eval_gt/* or eval_det/*. Returns the version's name "hrnet-pose/3", or
    None where the checkpoint was never registered in this store (nothing is written then).
    """
    missing = [name for name in PROTOCOL if name not in protocol]
    if missing:
        raise ValueError(f"protocol lacks {missing}")
    tracker = Tracker(track or TrackSettings(), storage)
    version = tracker.version(model_ref)
    if version is None:
        return None
    prefix = "eval_gt" if protocol["boxes"] == "gt" else "eval_det"
    with quiet():
        body = json.dumps({"protocol": dict(protocol), "stats": dict(stats)}, sort_keys=True)
        tag = EVALUATION + comparable(protocol)
        tracker.client.set_model_version_tag(version.name, version.version, tag, body)
        tracker.client.set_model_version_tag(
            version.name, version.version, f"{prefix}/AP", f"{stats['AP']:.4f}"
        )
        if version.run_id:
            for name, value in stats.items():
                tracker.client.log_metric(version.run_id, f"{prefix}/{name}", float(value))
            tracker.log_files(version.run_id, [Path(a) for a in artifacts], f"evaluation/{prefix}")
    return f"{version.name}/{version.version}"


def record_dataset(
    card: Mapping[str, Any],
    files: Sequence[Path],
    source: str,
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
) -> tuple[str, list[str]]:
    """A dataset's card (inspect_shards.make_card) and pictures as the one run of its digest, made or written
    anew. Its inputs are those of a training run on the dataset, so one search finds both. Returns the run's
    id and the names of the other runs on this dataset."""
    tracker = Tracker(track or TrackSettings(), storage)
    digest, splits = card["digest"], card["splits"]
    known = tracker.runs_on(digest)
    own = [run.info.run_id for run in known if run.data.tags.get("stage") == "inspect"]
    with quiet():
        tags = {"stage": "inspect", "dataset_digest": digest, "code_version": code_version()}
        name = f"dataset-{digest[:8]}"
        run_id = own[0] if own else tracker.new_run(name, tags)
        tracker.log_dataset(run_id, source, digest, [("inspection", split) for split in splits])
        tracker.log_params(run_id, {"data": card["config"]})
        for split, figures in splits.items():
            lost = sum(count["people"] for count in figures["rejected"].values())
            counts = {key: figures[key] for key in ("people", "photos", "variants", "shards", "bytes")}
            for what, count in {**counts, "people_left_out": lost}.items():
                tracker.client.log_metric(run_id, f"data/{split}/{what}", float(count))
        tracker.log_files(run_id, files, "dataset")
    tracker.close_run(run_id, "FINISHED")
    return run_id, [str(run.info.run_name) for run in known if run.info.run_id not in own]


def evaluations(version: ModelVersion) -> dict[str, dict[str, Any]]:
    """{key of what must be equal: {"protocol", "stats"}} that record_evaluation wrote to a version."""
    return {
        key.removeprefix(EVALUATION): json.loads(value)
        for key, value in version.tags.items()
        if key.startswith(EVALUATION)
    }


def comparable(protocol: Mapping[str, Any]) -> str:
    """12 hex digits: two APs with the same ones may be compared."""
    import hashlib

    text = json.dumps([protocol[name] for name in PROTOCOL], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _sha256(checkpoint: Path) -> str:
    """The weights' sha256, as the checkpoint folder states it."""
    file = checkpoint / "checkpoint.json"
    try:
        return str(json.loads(file.read_text())["weights_sha256"])
    except (OSError, ValueError, KeyError):
        raise CheckpointError(
            f"{file}: not a checkpoint folder with its weights' sha256. Give the folder that hrnet train or "
            f"hrnet import wrote."
        ) from None


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _absent_is_none() -> Iterator[None]:
    """Leave the block where MLflow says that there is no such model, version or alias; nothing else."""
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MLflow's and SQLAlchemy's chatter (deprecations among themselves, table creation) off for a block."""
    import mlflow  # noqa: F401 - its import sets the levels of its loggers

    names = ("mlflow", "alembic")
    levels = [logging.getLogger(name).level for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in zip(names, levels, strict=True):
                logging.getLogger(name).setLevel(level)
