"""The MLflow run of a training run: opened beside its start, and given at the end what came out.

A server that is away costs no training: figures are kept in the run's folder, and sent when it is back.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from hrnet_core.errors import first_line
from hrnet_core.locations import fetch, is_uri
from pipelines.process.code_version import code_version
from pipelines.settings.config import RunConfig
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import base_name, join, list_files
from pipelines.tracking.metric_log import MetricLog
from pipelines.tracking.registry import Registry
from pipelines.tracking.store import StoreAway, Tracker, reason, store_of
from pipelines.training.run_folder import (
    TrainResult,
    give_up,
    run_id_of,
    settings_shown,
    storage_of,
    write_run,
)

PARENT = "mlflow.parentRunId"
"""MLflow's tag of a run below another."""
PATIENCE_S = 5.0
"""For a server that is asked while training ends."""
NO_TAGS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Followed:
    """The MLflow run of a training run."""

    tracker: Tracker
    run_id: str

    def close(self, status: str) -> None:
        self.tracker.close_run(self.run_id, status)


def follow_run(
    config: RunConfig, manifest: Manifest, folder: str, tags: Mapping[str, str] = NO_TAGS
) -> Followed | None:
    """The run in MLflow, with `tags` besides its own, whose id run.json has then; None, and a sentence, where
    the server is away: figures are kept until it is back. A run that it knows from before keeps its id."""
    try:
        return open_run(Tracker(config.track, storage_of(folder)), config, manifest, folder, tags)
    except StoreAway as error:
        known = run_id_of(folder)
        write_run(folder, config, manifest.digest, known)
        when = "when it is back" if known else "at the end"
        print(
            f"{error} Training goes on without it: figures are kept in {join(folder, 'metrics.jsonl')}, and "
            f"sent {when}, or by the same command again.",
            flush=True,
        )
        return None


def closed_early(following: Future[Followed | None], config: RunConfig, folder: str, status: str) -> None:
    """The end of a run whose training came to none, also while `follow_run` is still at it. A database that
    is just being made is made to its end: half of one would be of no use for good."""
    server = store_of(config.track, storage_of(folder))
    wait([following], PATIENCE_S if server else None)
    if following.done() and not following.exception() and (followed := following.result()):
        followed.close(status)
    else:
        give_up(folder)


def open_run(
    tracker: Tracker, config: RunConfig, manifest: Manifest, folder: str, tags: Mapping[str, str] = NO_TAGS
) -> Followed:
    """The earlier run where there is one."""
    run_id = tracker.open_run(
        base_name(folder),
        settings_shown(config, {"evaluate", "predict", "serve", "sweep", "ray", "run"}),
        {
            "config": config.config_name,
            "dataset_digest": manifest.digest,
            "code_version": code_version(),
            "run_folder": folder,
            **tags,
        },
        {
            "source": manifest.folder,
            "digest": manifest.digest,
            "training": config.data.train_split,
            "validation": config.data.val_split,
        },
        run_id_of(folder),
    )
    write_run(folder, config, manifest.digest, run_id)
    return Followed(tracker, run_id)


def hand_over(
    config: RunConfig,
    manifest: Manifest,
    result: TrainResult,
    followed: Followed | None,
    add_onnx: Callable[[Path], object],
) -> TrainResult:
    """Give MLflow what it has not got yet: rows, pictures, the version, whose number the result has then; it
    stays None, with a sentence, where MLflow is away. add_onnx: writes model.onnx into a checkpoint."""
    folder = result.folder
    print("giving MLflow the results ...", flush=True)  # to a server minutes, of which nothing is seen
    try:
        if followed is None:
            followed = open_run(Tracker(config.track, storage_of(folder)), config, manifest, folder)
        tracker, run_id = followed.tracker, followed.run_id
        result = replace(result, run_id=run_id)
        metrics = MetricLog(join(folder, "metrics.jsonl"), result.step, tracker.uri, run_id)
        if not metrics.flush(force=True):
            raise ConnectionError("metrics were not taken")
        tags = {
            "val_gt/AP": f"{result.best_ap:.4f}",
            "run_name": result.run_name,
            "dataset_digest": result.dataset_digest,
            "codec": result.codec,
            "input_size": result.input_size,
        }
        with contextlib.ExitStack() as copies:
            files = copies.enter_context(_at_hand(folder))
            best = files / "best"
            if config.track.onnx:
                best = copies.enter_context(_with_onnx(best, add_onnx))
            tracker.log_files(run_id, [files / "config.yaml", files / "metrics.jsonl"])
            tracker.log_files(run_id, sorted((files / "pictures").glob("*.png")), "pictures")
            tracker.log_files(run_id, [files / "predictions.json"], "validation")
            version = Registry(tracker).register(run_id, best, tags, about_version(config, result))
        if result.epochs < config.train.epochs:
            early = f"after epoch {result.epochs} of {config.train.epochs}"
            tracker.client.set_tag(run_id, "stopped_early", early)
        followed.close("FINISHED")
        return replace(result, version=version)
    except Exception as error:
        print(
            f"MLflow did not take the results ({reason(error)}). The run is whole "
            f"in {folder}; the same command again sends them."
        )
        if followed:
            followed.close("FAILED")
        return result


def about_version(config: RunConfig, result: TrainResult) -> str:
    """The description of the version; its first words are all that the table of versions shows."""
    return (
        f"{result.run_name}: val_gt/AP {result.best_ap:.3f} (ground-truth boxes, crops of "
        f"{config.data.val_split}) after epoch {result.best_epoch} of {result.epochs}, on dataset "
        f"{result.dataset_digest[:8]}. HRNet of width {config.model.width}, {result.input_size}, codec "
        f"{result.codec}; config {config.config_name}. The same files: `{result.best_checkpoint}`. The AP "
        f"that counts for promote is that of `hrnet evaluate`."
    )


@contextlib.contextmanager
def _with_onnx(best: Path, add_onnx: Callable[[Path], object]) -> Iterator[Path]:
    """A copy of the checkpoint folder, while the block lasts, with model.onnx; without it, and with a
    sentence, where none can be made."""
    with tempfile.TemporaryDirectory(prefix="hrnet-version-") as copy:
        folder = shutil.copytree(best, Path(copy) / "best")
        try:
            add_onnx(folder)
        except Exception as error:  # the run is more than its file for another runtime
            print(f"the registered version has no model.onnx ({first_line(error)}); --track.no-onnx: none")
        yield folder


@contextlib.contextmanager
def _at_hand(folder: str) -> Iterator[Path]:
    """The run's folder on this machine, while the block lasts: a copy of what lies in a bucket."""
    if not is_uri(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="hrnet-results-") as copy:
        for part in ("", "best", "pictures"):
            place = join(folder, part) if part else folder
            fetch(place, Path(copy) / part, list(list_files(place)))
        yield Path(copy)
