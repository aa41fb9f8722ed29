"""MLflow's store, and the runs in it.

The driver of `hrnet train` owns one run: it opens it, ends it FINISHED, FAILED or KILLED, and registers the
best checkpoint. Rank 0 of the workers writes metrics into it (metric_log.py). A server that is away costs
no training: the metrics' file stays, and the run is opened or completed at the end, or by the same command
again.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core.errors import ConfigError, first_line
from hrnet_core.locations import is_uri, one_line, without_credentials
from pipelines.cluster.session import on_cluster
from pipelines.process import environment
from pipelines.process.code_version import code_version
from pipelines.settings.config import TrackSettings

if TYPE_CHECKING:
    from mlflow.entities import Run

FEW_TRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow asks a server that is away for minutes; a first look gives up after some seconds."""
DIGITS = 36
"""MLflow's limit for the digest of a dataset: the run's tag dataset_digest has all 64."""
CHATTY = ("mlflow", "alembic", "urllib3.connectionpool")
"""Loggers of MLflow, of its tables, and of its requests: each retry is a warning there."""
RELATIVE = re.compile(r"(sqlite(?:\+\w+)?:///|file:|(?!databricks|uc$))([^/:?][^:?]*)(\?.*)?")
"""The address of a file or folder as seen from where a process stands: how it begins, path, query."""


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """MLflow's and SQLAlchemy's chatter (deprecations among themselves, table creation, retries) off for a
    block, and progress bars and addresses for good."""
    import mlflow  # noqa: F401 - its import sets the levels of its loggers

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with warnings.catch_warnings(action="ignore"), contextlib.ExitStack() as restored:
        for logger in map(logging.getLogger, CHATTY):
            restored.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_away(error: BaseException) -> bool:
    """Whether a call of MLflow failed because nobody answers, or because of what was answered."""
    return any(isinstance(cause, OSError) for cause in _causes(error))


def reason(error: BaseException) -> str:
    """Why a call of MLflow failed, in a line without passwords: where nobody answers by the innermost cause,
    as around it requests and urllib3 say address and path again."""
    if not is_away(error):
        return without_credentials(one_line(error))[:300]
    *_, cause = _causes(error)
    inner = next((part for part in cause.args if isinstance(part, OSError)), cause)
    of_a_file = getattr(inner, "filename", None) is not None
    why = (not of_a_file and getattr(inner, "strerror", None)) or one_line(inner) or type(inner).__name__
    return without_credentials(why)[:300]


def store_of(settings: TrackSettings, storage: str | Path) -> str | None:
    """The address of the server that `track.uri` or MLFLOW_TRACKING_URI names; None: SQLite in `storage`.

    ConfigError on a cluster or for a bucket without one: neither has a file that all could write.
    """
    named = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not named and on_cluster():
        raise ConfigError(
            "MLFLOW_TRACKING_URI is not set, and RAY_ADDRESS names a cluster: its machines cannot share "
            "a SQLite file. Start a server (infra/ has one) and set MLFLOW_TRACKING_URI in the job's "
            "environment, or pass --track.uri."
        )
    if not named and is_uri(str(storage)):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI is not set, and MLflow's SQLite file cannot lie in {storage}. Start a "
            f"server (infra/ has one) and name it there or by --track.uri, or give a folder of this machine "
            f"as --run.storage."
        )
    return named


def uri_of(settings: TrackSettings, storage: str | Path) -> str:
    """Of the store, as MLflow takes it; errors of `store_of`. A relative file or folder is made absolute:
    workers stand in a folder of their own."""
    uri = store_of(settings, storage) or f"sqlite:///{Path(storage).resolve() / 'mlflow.db'}"
    if found := RELATIVE.fullmatch(uri):
        uri = f"{found[1]}{os.path.abspath(found[2])}{found[3] or ''}"
    return uri


@contextlib.contextmanager
def refusals_told(store: str) -> Iterator[None]:
    """ConfigError where MLflow's server at `store` wants another user for what is done in the block, or does
    not know the name by which it was called."""
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        if why := _refusal(error.error_code, str(error)):
            raise ConfigError(f"the MLflow server {store} {why}") from None
        raise


def _refusal(code: str, said: str) -> str | None:
    """The rest of a sentence about an answer 401 or 403; None for any other."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if code == "UNAUTHENTICATED":
        got = f"did not take those of user {user}" if user else "got none"
        return (
            f"asks for a user and password, and {got}. Set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD in the environment of this command: a job has that of `ray start` on "
            f"the nodes."
        )
    if code != "PERMISSION_DENIED":
        return None
    if "Host header" in said:
        return (
            "was called by a name that it does not know. Add the name to MLFLOW_SERVER_ALLOWED_HOSTS where "
            "the server is started (infra/mlflow.sh), or name it by its address."
        )
    return (
        f"does not let {f'user {user}' if user else 'us'} do that. Have its admin allow it "
        f"(docs/cluster.md#mlflow), or give names of your own: --track.experiment, --track.registered-model."
    )


class StoreAway(ConfigError):
    """The server that was named does not answer now: nothing is wrong with its address as such."""


class Tracker:
    """The store that the settings name.

    `storage` is the folder that holds mlflow.db and its artifacts where no server is named (`store_of`, whose
    errors are raised). ConfigError too where the store cannot be used, StoreAway where it does not answer.
    create=False, for who only reads: a database that is not there is not made; `there` is then False, and the
    store must not be asked.
    """

    def __init__(self, settings: TrackSettings, storage: str | Path, create: bool = True) -> None:
        self.settings = settings
        self.local = not store_of(settings, storage)
        self.storage = Path(storage).resolve() if self.local else Path()
        self.uri = uri_of(settings, storage)
        self.shown = without_credentials(self.uri)
        self.there = create or not self.local or (self.storage / "mlflow.db").exists()
        if self.there:
            self._connect()

    @quiet_mlflow()
    def _connect(self) -> None:
        import mlflow

        with contextlib.ExitStack() as stack:
            stack.enter_context(environment.defaults(FEW_TRIES))
            if self.local:
                # Processes that create the tables at the same time break the file for good: one by one.
                self.storage.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context((self.storage / "mlflow.db.lock").open("w")), fcntl.LOCK_EX)
            try:
                self.select()
                self.client = mlflow.MlflowClient(self.uri, self.uri)
                with refusals_told(self.shown):
                    self.client.search_experiments(max_results=1)
            except ConfigError:
                raise
            except Exception as error:
                away = is_away(error) and not self.local
                raise (StoreAway if away else ConfigError)(
                    f"the MLflow store {self.shown} does not answer ({reason(error)}). Start the server, or "
                    f"correct --track.uri / MLFLOW_TRACKING_URI; without either, SQLite in --run.storage is "
                    f"used."
                ) from None

    def select(self) -> None:
        """This store for MLflow's functions that take none."""
        import mlflow

        named = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        # It also sets variables, which the next Tracker and other processes would take for the user's wish.
        for name, value in named.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    @quiet_mlflow()
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

        if run_id is not None:
            with contextlib.suppress(mlflow.MlflowException), refusals_told(self.shown):
                if self.client.get_run(run_id).info.lifecycle_stage == "active":
                    self.client.update_run(run_id, status="RUNNING")
                    return run_id
        run_id = self.new_run(name, tags)
        pairs = [(context, dataset[context]) for context in ("training", "validation")]
        self.log_dataset(run_id, dataset["source"], dataset["digest"], pairs)
        self.log_params(run_id, params)
        return run_id

    def new_run(self, name: str, tags: Mapping[str, str]) -> str:
        with refusals_told(self.shown):
            made = self.client.create_run(self._experiment(), run_name=name, tags={**made_by(), **tags})
        return str(made.info.run_id)

    def log_dataset(self, run_id: str, source: str, digest: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Splits of a dataset as inputs of a run: (context, split)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # As MLflow's resolver says it, which does not know Azure's.
        kind = source.partition("://")[0] if is_uri(source) else "local"
        for context, split in pairs:
            entity = Dataset(split, digest[:DIGITS], kind, json.dumps({"uri": source}))
            self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:6000]) for key, value in flatten(params).items()]
        for start in range(0, len(rows), 100):
            self.client.log_batch(run_id, params=rows[start : start + 100])

    @quiet_mlflow()
    def runs_on(self, digest: str) -> list[Run]:
        """All runs of the experiment that have the dataset of this digest as an input, newest first."""
        with refusals_told(self.shown):
            found = self.client.search_runs([self._experiment()], f"dataset.digest = '{digest[:DIGITS]}'")
        return [run for run in found if run.data.tags.get("dataset_digest") == digest]

    @quiet_mlflow()
    def close_run(self, run_id: str, status: str) -> None:
        """End the run: "FINISHED", "FAILED" or "KILLED". In a store that is away it stays RUNNING until it is
        opened again."""
        with contextlib.suppress(Exception):
            self.client.set_terminated(run_id, status)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """The last values of a run's metrics."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
        self.client.log_batch(run_id, metrics=rows)

    def log_files(self, run_id: str, files: Iterable[Path], folder: str | None = None) -> None:
        for file in files:
            self.client.log_artifact(run_id, str(file), folder)

    def _experiment(self) -> str:
        import mlflow

        name = self.settings.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            place = (self.storage / "mlartifacts").as_uri() if self.local else None
            # Without it MLflow's page opens in its view for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(self.client.create_experiment(name, artifact_location=place, tags=kind))
            except mlflow.MlflowException as error:
                found = self.client.get_experiment_by_name(name)
                if found is None and error.error_code == "INVALID_PARAMETER_VALUE":
                    raise ConfigError(
                        f"--track.experiment {name!r}: MLflow takes no experiment of this name "
                        f"({first_line(error)}). Choose another."
                    ) from None
                if found is None:
                    raise
        return str(found.experiment_id)  # where it was not there before, another driver was faster


@quiet_mlflow()
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
    tags = {"stage": "inspect", "dataset_digest": digest, "code_version": code_version()}
    with refusals_told(tracker.shown):  # the run may be another user's
        run_id = own[0] if own else tracker.new_run(f"dataset-{digest[:8]}", tags)
        tracker.log_dataset(run_id, source, digest, [("inspection", split) for split in splits])
        tracker.log_params(run_id, {"data": card["config"]})
        for split, figures in splits.items():
            counts = {key: figures[key] for key in ("people", "photos", "variants", "shards", "bytes")}
            counts["people_left_out"] = sum(count["people"] for count in figures["rejected"].values())
            tracker.log_metrics(run_id, {f"data/{split}/{what}": n for what, n in counts.items()})
        tracker.log_files(run_id, files, "dataset")
    tracker.close_run(run_id, "FINISHED")
    return run_id, [str(run.info.run_name) for run in known if run.info.run_id not in own]


def made_by() -> dict[str, str]:
    """Tags of this process, a driver, for what MLflow's page shows as "Created by" and "Source", and for
    `ray job logs`."""
    tags = {"mlflow.source.name": "hrnet", "mlflow.source.type": "JOB"}
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    if job := environment.job_name():
        tags["ray_job"] = job
    return tags


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
