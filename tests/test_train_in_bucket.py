"""A run whose storage is a bucket: the same as on disk, one driver at a time, and exact after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from bucket_server import Bucket, Fault
from free_ports import free_port
from pyarrow import fs
from test_feed import dotted_shards
from test_train import SMALL, losses, small_config

from hrnet_core import locations
from hrnet_core.checkpoint import TRAINER, fetch_checkpoint, load_checkpoint, read_trainer_state
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.locations import open_folder
from pipelines import train as driver
from pipelines.process.stop import stoppable
from pipelines.settings.config import TrackSettings
from pipelines.shards.manifest import Manifest
from pipelines.storage import lease
from pipelines.storage.files import join, list_files, read_file, write_json
from pipelines.tracking.metric_log import read_rows
from pipelines.tracking.registry import Registry
from pipelines.tracking.store import Tracker
from pipelines.training.loop import train_epochs
from pipelines.training.run_folder import (
    TrainResult,
    keep_error,
    only_one,
    read_record,
    refuse_to_move,
    saved_step,
)
from pipelines.training.state import Job, Training, set_up


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def one_worker(config: Any, folder: str, saved: Path | None = None) -> tuple[Training, list[Path]]:
    """Worker 0 of 1 without Ray; the list fills with the folders of its checkpoints, kept in run.storage."""
    checkpoints: list[Path] = []

    def report(figures: dict[str, Any], made: str | None) -> None:
        checkpoints.append(Path(shutil.move(str(made), config.run.storage)))

    job = Job(config, config.data.shards, folder, tracking_uri=None)
    return set_up(job, 0, 1, torch.device("cpu"), report, saved), checkpoints


# --- what a worker writes ---------------------------------------------------------------------------------


def test_a_worker_leaves_in_a_bucket_what_it_leaves_on_disk(
    bucket: str, manifest: Manifest, tmp_path: Path
) -> None:
    """best/, predictions, pictures; rows of metrics up to each checkpoint, so that going on finds them."""
    config = small_config(manifest, tmp_path, checkpoint_minutes=1e-9)
    here, _ = one_worker(config, str(tmp_path / "r"))
    train_epochs(here)
    there, checkpoints = one_worker(config, f"{bucket}/runs/r")
    train_epochs(there)
    assert losses(there) == losses(here)
    names = {f.relative_to(tmp_path / "r").as_posix() for f in (tmp_path / "r").rglob("*") if f.is_file()}
    files, root = open_folder(f"{bucket}/runs/r")
    found = files.get_file_info(fs.FileSelector(root, recursive=True))
    assert {f.path.removeprefix(f"{root}/") for f in found if f.type == fs.FileType.File} == names
    assert read_file(f"{bucket}/runs/r/predictions.json") == (tmp_path / "r/predictions.json").read_bytes()
    model, spec = load_checkpoint(fetch_checkpoint(f"{bucket}/runs/r/best", tmp_path / "copy"))
    assert model.config == SMALL
    assert spec.provenance["epoch"] == here.standing.best_epoch

    again, _ = one_worker(config, f"{bucket}/runs/r", checkpoints[3])
    assert [row["step"] for row in read_rows(f"{bucket}/runs/r/metrics.jsonl")][-1] == 4
    train_epochs(again)
    assert losses(again) == losses(here)
    for name, value in here.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_best_is_whole_or_refused_while_it_is_replaced(
    bucket: str, server: Bucket, manifest: Manifest, tmp_path: Path
) -> None:
    """An upload that dies in between leaves weights that their description does not fit: never used."""
    run, _ = one_worker(small_config(manifest, tmp_path), f"{bucket}/runs/r")
    train_epochs(run)
    server.faults.append(Fault("PUT", "best/checkpoint.json", 403, "AccessDenied"))
    again, _ = one_worker(small_config(manifest, tmp_path, lr=1e-4), f"{bucket}/runs/r")
    with pytest.raises(OSError, match="checkpoint"):
        train_epochs(again)
    with pytest.raises(CheckpointError, match="these are not the weights that were saved"):
        load_checkpoint(fetch_checkpoint(f"{bucket}/runs/r/best", tmp_path / "copy"))


def test_the_version_of_a_checkpoint_in_a_bucket_is_found(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hrnet promote asks for it: by its weights."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    best = f"{bucket}/runs/r/best"
    write_json(f"{best}/checkpoint.json", {"weights_sha256": "5" * 64})
    tracker = Tracker(TrackSettings(), tmp_path)
    models = Registry(tracker)
    assert models.version(best) is None
    tracker.client.create_registered_model("hrnet-pose")
    tracker.client.create_model_version("hrnet-pose", str(tmp_path), tags={"weights_sha256": "5" * 64})
    found = models.version(best)
    assert found is not None
    assert int(found.version) == 1
    with pytest.raises(CheckpointError, match=f"{bucket}/none/checkpoint.json: not a checkpoint folder"):
        models.version(f"{bucket}/none")


# --- one driver -------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_a_dead_ones_run_is_taken_over(
    any_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lock = f"{any_bucket}/runs/r", f"{any_bucket}/runs/.r.lock"
    with only_one(run):
        owner = json.loads(read_file(lock))
        assert owner["process"] == os.getpid()
        with (
            pytest.raises(ConfigError, match=rf"{run}: process {os.getpid()} on .* takes over in 1[78]\d s"),
            only_one(run),
        ):
            pass
    assert list_files(f"{any_bucket}/runs") == {}
    # Of another machine: alive for all we know, until it was silent too long.
    write_json(lock, {**owner, "host": "elsewhere"})
    with pytest.raises(ConfigError, match=r"r: process \d+ on elsewhere has it"), only_one(run):
        pass
    write_json(lock, {**owner, "host": "elsewhere", "job": "train-7"})
    with pytest.raises(ConfigError, match=r"r: job train-7, process \d+ on elsewhere has it"), only_one(run):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(lease, "LEASE_S", 0.0)
        with only_one(run):
            assert json.loads(read_file(lock))["host"] != "elsewhere"
    # Of this one: its process tells.
    write_json(lock, {**owner, "process": 999_999_999})
    with only_one(run):
        pass


def test_a_driver_whose_lease_was_taken_stops(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lock = f"{bucket}/runs/r", f"{bucket}/runs/.r.lock"
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    other = {"host": "elsewhere", "process": 1, "id": "x"}
    with pytest.raises(ConfigError, match="another process took it over"):
        _hold_while_another_takes(run, lambda: write_json(lock, other))
    assert json.loads(read_file(lock)) == other


def _hold_while_another_takes(run: str, take: Callable[[], None]) -> None:
    with stoppable(), only_one(run):  # as a verb runs, also where the shell had Ctrl-C ignored
        for number in range(100):
            if number % 20 == 0:  # again: a renewal that had begun writes over what was taken
                take()
            time.sleep(0.1)


def test_two_drivers_of_one_moment(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found no lease; the later write stands."""

    def both(file: str, owner: dict[str, Any]) -> None:
        for one in (owner, {"host": "elsewhere", "process": 1, "id": "x"}):
            write_json(file, one)

    monkeypatch.setattr(lease, "write_json", both)
    with pytest.raises(ConfigError, match="in the same moment"), only_one(f"{bucket}/runs/r"):
        pass


# --- refused in a sentence --------------------------------------------------------------------------------


def test_what_a_bucket_cannot_do_is_said_before_work(
    bucket: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(driver, "ray_session", None)  # would fail if it were called
    config = small_config(manifest, tmp_path)
    config = config.model_copy(update={"run": config.run.model_copy(update={"storage": f"{bucket}/runs"})})
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI.*--track\.uri"):
        driver.train(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    missing = config.run.model_copy(update={"storage": "s3://no-such-bucket-anywhere/runs"})
    with pytest.raises(DataError, match=r"--run\.storage: s3://no-such.*no bucket"):
        driver.train(config.model_copy(update={"run": missing}))
    write_json(f"{bucket}/runs/r/run.json", {"run_id": None, "decides": {}})
    with pytest.raises(ConfigError, match=r"--run\.fresh.*nothing can be moved.*--run\.name"):
        refuse_to_move(f"{bucket}/runs/r")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_run_are_kept_one_after_the_other(bucket: str) -> None:
    file = keep_error(f"{bucket}/runs/r", "first")
    assert keep_error(f"{bucket}/runs/r", "second") == file == f"{bucket}/runs/r/errors.log"
    told = read_file(file).decode().splitlines()
    assert told[1::2] == ["first", "second"]


# --- the whole way ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_from_the_bucket_with_equal_weights(
    bucket: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command through Ray Train: killed with all its processes after a checkpoint within an epoch,
    and again: the trainer's state of a run that was never interrupted, bit for bit."""
    with tracking_server(tmp_path) as uri:
        settings = tmp_path / "small.yaml"
        config = small_config(manifest, tmp_path, epochs=4, num_workers=2, cpus_per_worker=0.5)
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"checkpoint_minutes": 1e-9, "max_failures": 3})}
        )
        settings.write_text(json.dumps(config.model_dump(mode="json", exclude={"config_name"})))

        def command(storage: str) -> subprocess.Popen[str]:
            argv = [sys.executable, "-m", "pipelines.cli", "train", str(settings), "--run.storage", storage]
            return subprocess.Popen(
                [*argv, "--track.uri", uri, "--ray.num-cpus", "2"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            )

        whole = command(str(tmp_path / "whole"))
        told = whole.communicate(timeout=300)[0]
        assert whole.returncode == 0, told

        storage = f"{bucket}/runs"
        killed = command(storage)
        deadline = time.monotonic() + 300
        while saved_step(f"{storage}/r") < 4 and time.monotonic() < deadline:
            assert killed.poll() is None, killed.communicate()[0]
            time.sleep(0.05)
        _kill_tree(killed)
        assert 4 <= saved_step(f"{storage}/r") < 12, "it was through before the kill"
        again = command(storage)
        told = again.communicate(timeout=300)[0]
        assert again.returncode == 0, told
        assert "Traceback" not in told

        folders = (str(tmp_path / "whole" / "r"), f"{storage}/r")
        ours, theirs = (_trainer(folder, tmp_path / str(i)) for i, folder in enumerate(folders))
        for name, value in ours["model"].items():
            assert torch.equal(value, theirs["model"][name]), name
        moments = (ours["optimizer"]["state"], theirs["optimizer"]["state"])
        for key, one in moments[0].items():
            for what, value in one.items():
                assert torch.equal(value, moments[1][key][what]), (key, what)
        rows = [
            read_rows(join(folder, "metrics.jsonl"))
            for folder in (str(tmp_path / "whole" / "r"), f"{storage}/r")
        ]
        loss = [{row["step"]: row["train/loss"] for row in some if "train/loss" in row} for some in rows]
        assert loss[0] == loss[1]
        assert list(loss[0]) == list(range(1, 13))

        result = TrainResult.read(f"{storage}/r")
        assert result is not None
        assert result.version is not None
        assert result.best_checkpoint == f"{storage}/r/best"
        from mlflow import MlflowClient

        client = MlflowClient(uri, uri)
        assert client.get_run(result.run_id).info.status == "FINISHED"
        names = {a.path for a in client.list_artifacts(result.run_id)}
        assert {"config.yaml", "metrics.jsonl", "pictures", "validation"} <= names
        assert not list(tmp_path.glob("s3:*"))
        assert list_files(storage) == {}, "the lease is given back"


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """An MLflow of this machine's own: its address."""
    port = free_port()
    (folder / "mlflow").mkdir()
    serve = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    serve += ["--backend-store-uri", f"sqlite:///{folder}/mlflow/db", "--workers", "1"]
    serve += ["--artifacts-destination", str(folder / "mlflow" / "files")]
    with (folder / "mlflow.log").open("w") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_server(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            _kill_tree(server)


def _trainer(folder: str, into: Path) -> dict[str, Any]:
    """The state of the last checkpoint."""
    latest = (read_record(folder, "ray/checkpoint_manager_snapshot.json") or {})["latest_checkpoint_result"]
    place = join(folder, f"ray/{latest['checkpoint_dir_name']}")
    return read_trainer_state(locations.fetch(place, into, (TRAINER,)))


def _wait_for_server(uri: str) -> None:
    import urllib.request

    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2)
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.3)


def _kill_tree(process: subprocess.Popen[Any]) -> None:
    """The process and all that came of it, by their ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
