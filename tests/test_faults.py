"""Faults of a training run: each a sentence with the way on, tracebacks in a file, nothing lost or spoilt."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_feed import dotted_shards
from test_train import made_up_part, new_model, one_worker, small_config, workers
from torch import multiprocessing

from hrnet_core.checkpoint import load_checkpoint
from hrnet_core.errors import ConfigError, DataError, Failure
from pipelines import train as driver
from pipelines.cluster.session import quiet_engines
from pipelines.process.stop import begun, waited
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import BucketAway
from pipelines.tracking.metric_log import MetricLog, read_rows
from pipelines.tracking.store import Tracker, quiet_mlflow
from pipelines.training.ddp import wrap
from pipelines.training.faults import Faults, curable, what_happened
from pipelines.training.followed import closed_early, follow_run, hand_over
from pipelines.training.loop import Diverged, train_epochs
from pipelines.training.run_folder import (
    TrainResult,
    begin_run,
    check_same_run,
    give_up,
    place,
    reached_step,
    saved_step,
    tracked_as,
    where_it_stands,
    write_run,
)
from pipelines.training.state import Training, make_optimizer
from pipelines.training.step import train_step


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def snapshot(run_folder: Path, step: int) -> None:
    """As Ray Train writes it."""
    (run_folder / "ray").mkdir(parents=True, exist_ok=True)
    latest = {"checkpoint_dir_name": "c", "metrics": {"step": step}}
    (run_folder / "ray" / "checkpoint_manager_snapshot.json").write_text(
        json.dumps({"latest_checkpoint_result": latest})
    )


# --- steps that are not finite ----------------------------------------------------------------------------


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for one in optimizer.state.values() for v in one.values()]
    return [t.detach().clone() for t in (*model.parameters(), *moments)]


@pytest.mark.parametrize("optimizer_name", ["adam", "adamw"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(optimizer_name: str, wrong: float) -> None:
    """Weights, both moments and the count of steps bit for bit; the next step is what it would have been."""
    settings = TrainSettings(optimizer=optimizer_name, weight_decay=0.1)
    model, twin = new_model(), new_model()
    optimizers = [make_optimizer(one, settings) for one in (model, twin)]
    parts = [made_up_part(step, slice(0, 8), 1.0) for step in range(3)]
    broken = replace(parts[1], heatmaps=parts[1].heatmaps.clone())
    broken.heatmaps[0, 0, 0, 0] = wrong
    train_step(model, optimizers[0], [parts[0]], settings)
    before = state_of(model, optimizers[0])
    assert len(before) == 4 * len(list(model.parameters()))
    assert train_step(model, optimizers[0], [broken], settings).isnan()
    for one, other in zip(before, state_of(model, optimizers[0]), strict=True):
        assert torch.equal(one, other)
    loss = train_step(model, optimizers[0], [parts[2]], settings)

    train_step(twin, optimizers[1], [parts[0]], settings)
    assert torch.equal(train_step(twin, optimizers[1], [parts[2]], settings), loss)
    for one, other in zip(state_of(twin, optimizers[1]), state_of(model, optimizers[0]), strict=True):
        assert torch.equal(one, other)


def one_of_two(rank: int, folder: str) -> None:
    with workers(rank, folder):
        settings = TrainSettings()
        model = wrap(new_model(), torch.device("cpu"), 2)
        optimizer = make_optimizer(model, settings)
        part = made_up_part(0, slice(4 * rank, 4 * rank + 4), 1.0)
        if rank == 1:
            part.heatmaps[0, 0, 0, 0] = torch.nan
        before = state_of(model, optimizer)
        loss = train_step(model, optimizer, [part], settings)
        kept = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        torch.save((loss, kept), f"{folder}/{rank}.pt")


def test_all_ranks_leave_out_a_step_that_one_found_not_finite(tmp_path: Path) -> None:
    """Without asking each other: the averaged gradient tells each of them."""
    multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        loss, kept = torch.load(tmp_path / f"{rank}.pt")
        assert loss.isnan()
        assert kept


def poisoned(run: Training, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int, int], bool]) -> None:
    """The feed with NaN in the targets of batches where wrong(epoch, number)."""
    import numpy as np

    original = run.feed.batches

    def batches(epoch: int, start: int, stop: int) -> Any:
        for number, batch in enumerate(original(epoch, start, stop), epoch * run.feed.steps + start):
            heatmaps = batch.heatmaps.copy()
            heatmaps[0, 0, 0, 0] = np.nan if wrong(*divmod(number, run.feed.steps)) else 0
            yield replace(batch, heatmaps=heatmaps)

    monkeypatch.setattr(run.feed, "batches", batches)


def test_a_batch_left_out_is_counted_and_training_goes_on_exactly(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Going on from the checkpoint after it gives the weights of the run that went through."""
    config = small_config(manifest, tmp_path, checkpoint_minutes=1e-9)
    run, reports = one_worker(config, tmp_path / "run")
    poisoned(run, monkeypatch, lambda epoch, number: (epoch, number) == (0, 1))
    train_epochs(run)
    assert (run.standing.skipped, run.standing.skipped_in_a_row) == (1, 0)
    assert run.standing.total_steps == 6
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {5}
    assert "left out 1 of 1 batches" in (told := capsys.readouterr().out)
    assert "from epoch 1, batch 2 on; 1 in all" in told
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/lr" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert [row["step"] for row in rows if "train/loss" not in row] == [2]
    again, _ = one_worker(config, tmp_path / "again", Path(reports[1]["folder"]))
    assert again.standing.skipped_in_a_row == 1
    train_epochs(again)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("log_every", [1, 2])
def test_so_many_in_a_row_end_the_run_with_the_rows_of_the_first(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """Two in a row, one good, three in a row: over the end of an epoch and of an interval."""
    config = small_config(manifest, tmp_path, log_every=log_every, max_skipped_steps=3, epochs=3)
    run, _ = one_worker(config, tmp_path / "run")
    wrong = {0, 1, 3, 4, 5}
    poisoned(run, monkeypatch, lambda epoch, number: 3 * epoch + number in wrong)
    with pytest.raises(
        Diverged, match=r"epoch 2, batch .* \(3 in a row\)\. The rows of that batch: ann_id 1"
    ):
        train_epochs(run)
    assert run.standing.skipped == 5


def test_statistics_that_a_batch_spoilt_end_the_run(manifest: Manifest, tmp_path: Path) -> None:
    """BatchNorm has taken them in before there is a gradient: going on would never be right again."""
    run, reports = one_worker(small_config(manifest, tmp_path), tmp_path / "run")
    with torch.no_grad():
        run.model.conv1.weight[0] = torch.inf
    with pytest.raises(Diverged, match=r"epoch 1, batch 1 \(BatchNorm.*no epoch is through") as caught:
        train_epochs(run)
    assert "best" not in str(caught.value).partition("Nothing after")[2].partition("no epoch")[0]
    assert reports == []


# --- a worker that is lost --------------------------------------------------------------------------------

KILLED = (
    "A worker health check failed.\nThe actor died unexpectedly before finishing this task.\nWorker exit "
    "type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2."
)


def test_a_lost_worker_is_one_sentence_and_its_traceback_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    snapshot(folder, 20)
    (folder / "metrics.jsonl").write_text('{"step": 30, "time_ms": 1}\n{"step": 31, "time_ms": 1}\n{"st')
    faults = Faults(str(folder), 13, 3)
    beside = RuntimeError("Connection closed by peer")
    beside.add_note("Traceback: where the other one stood")
    faults.after_exception(None, {0: beside, 1: RuntimeError(KILLED)})
    told = capsys.readouterr().out
    assert told.startswith("worker 1 was lost (its process was killed")
    assert (
        "after epoch 3, batch 5; going on from the checkpoint of epoch 2, batch 7 (restart 1 of 3; " in told
    )
    assert told.count("\n") == 1
    kept = (folder / "errors.log").read_text()
    assert [
        word for word in (KILLED, "Connection closed", "where the other one stood") if word not in kept
    ] == []
    for _ in range(3):
        faults.after_exception(None, {1: RuntimeError(KILLED)})
    told = capsys.readouterr().out
    assert "restart 3 of 3" in told
    assert "restart 4" not in told  # the driver's to say


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Faults(str(tmp_path / "r"), 13, -1).after_exception(None, {0: ValueError("odd")})
    assert (
        "worker 0 failed (ValueError: odd) after no batch; beginning again (restart 1; "
        in capsys.readouterr().out
    )
    assert "no checkpoint yet, the same command begins again" in where_it_stands(str(tmp_path / "r"), 13)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("shard 3: bad"), "shard 3: bad"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/f"), "/d/f: cannot be written (No space left"),
        (OSError(errno.EFBIG, "File too large"), "FOLDER: cannot be written (File too large)"),
    ],
)
def test_what_no_restart_cures_ends_the_run_at_once(tmp_path: Path, error: Exception, told: str) -> None:
    faults = Faults(str(tmp_path), 13, 3)
    wrapped = RuntimeError("in a worker")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        with pytest.raises(DataError) as caught:
            faults.after_exception(None, {0: RuntimeError(KILLED), 1: one})
        assert told.replace("FOLDER", str(tmp_path)) in str(caught.value)
    assert curable(OSError(errno.ENOENT, "No such file"), "x") is None
    assert curable(BucketAway("s3://b/x: the bucket did not give it"), "x") is None


def test_a_folder_that_takes_no_word_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").write_text("no folder")
    Faults(str(tmp_path / "r"), 13, 3).after_exception(None, {1: RuntimeError(KILLED)})
    told = capsys.readouterr().out
    assert "worker 1 was lost" in told
    assert "going on from the last checkpoint (restart 1 of 3; not kept: " in told


def test_places_are_counted_as_people_count() -> None:
    assert [place(step, 13) for step in (0, 1, 13, 14)] == [
        "no batch",
        "epoch 1, batch 1",
        "epoch 1, batch 13",
        "epoch 2, batch 1",
    ]


def test_the_one_that_died_is_named_and_not_those_that_miss_it() -> None:
    missing = RuntimeError("Connection closed by peer")
    gone = RuntimeError("The actor is dead because its node died.")
    assert what_happened({0: missing, 1: gone}) == "worker 1 was lost (its machine is gone)"
    told = "worker 0 lost the connection to another worker (its machine or process is gone)"
    assert what_happened({0: missing}) == told
    assert what_happened({0: RuntimeError("odd")}) == "worker 0 failed (RuntimeError: odd)"


def test_what_is_unexpected_is_a_sentence_with_a_file(tmp_path: Path) -> None:
    snapshot(tmp_path, 3)

    def fails() -> None:
        with driver.told_in_a_sentence(str(tmp_path), 3), quiet_engines():
            os.write(2, b"core_worker.cc: something dreadful\n")
            raise KeyError("odd")

    with pytest.raises(
        Failure, match=rf"{tmp_path}: KeyError: 'odd'\. .*checkpoint of epoch 1, batch 3.*Details"
    ):
        fails()
    kept = (tmp_path / "errors.log").read_text()
    assert "something dreadful" in kept
    assert 'raise KeyError("odd")' in kept


def test_what_engines_say_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    with quiet_engines():
        logging.getLogger("pipelines.x").warning("ours, logged")
        os.write(2, b"core_worker.cc: retrying\n")
        print("a banner", file=sys.stderr)
        print("\x1b[33m(raylet)\x1b[0m A worker died or was killed")
        print("ours")
    logging.getLogger().removeHandler(handler)
    print("after", file=sys.stderr)
    assert capfd.readouterr() == ("ours\n", "ours, logged\nafter\n")


# --- Ctrl-C, SIGTERM --------------------------------------------------------------------------------------

VERB = """
import sys, time
from pipelines import cli
from pipelines.process.stop import begun, waited
def wait(seconds):
    try:
        print("begun", flush=True)
        waited(begun(lambda: time.sleep(seconds)))
    except KeyboardInterrupt as error:
        error.add_note("Where it stands.")
        print("ending", flush=True)
        time.sleep(float(sys.argv[1]))
        raise
cli.VERBS["promote"] = (lambda args: wait(60), *cli.VERBS["promote"][1:])
sys.exit(cli.main(["promote"]))
"""


@pytest.mark.parametrize(
    ("signum", "code", "name"), [(2, 130, "Ctrl-C"), (15, 143, "SIGTERM"), (1, 129, "SIGHUP")]
)
def test_a_signal_ends_a_verb_with_a_sentence(signum: int, code: int, name: str) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", VERB, "0"], **pipes)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signum)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert told == f"hrnet promote: stopped by {name}. Where it stands.\n"


def test_the_second_signal_ends_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", VERB, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


def test_a_terminal_that_is_closed_ends_a_verb_in_good_order() -> None:
    """What it says then goes nowhere, and is no error that keeps it from its end."""
    ours, its = pty.openpty()

    def on_its_terminal() -> None:
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", VERB, "0"],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=on_its_terminal,
    )
    os.close(its)
    assert b"begun" in os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=60) == 129


def test_a_reader_that_the_same_signal_ended_costs_no_verb_its_end() -> None:
    """hrnet ... 2>&1 | tee log"""
    process = subprocess.Popen(
        [sys.executable, "-c", VERB, "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_work_in_a_thread_gives_its_result_or_its_exception() -> None:
    assert waited(begun(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        waited(begun(lambda: 1 // 0))


# --- MLflow away ------------------------------------------------------------------------------------------


def test_a_server_that_is_away_at_the_start_costs_a_sentence_and_gets_all_later(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens at the address; by the end somebody does (here a store that needs no server)."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = small_config(manifest, tmp_path)
    folder = str(tmp_path / "r")
    away = config.model_copy(
        update={"track": config.track.model_copy(update={"uri": "http://user:secret@127.0.0.1:9"})}
    )
    assert follow_run(away, manifest, folder) is None
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert [w for w in ("does not answer", "Training goes on", "metrics.jsonl") if w not in told] == []
    assert "secret" not in told
    run, _ = one_worker(config, tmp_path / "r")
    train_epochs(run)
    result = driver._result(run.standing, folder, manifest)
    assert hand_over(away, manifest, result, None, driver.add_onnx).version is None
    assert "same command again sends them" in capsys.readouterr().out

    uri = f"sqlite:///{tmp_path}/late.db"
    monkeypatch.chdir(tmp_path)  # where such a store puts files
    back = config.model_copy(update={"track": config.track.model_copy(update={"uri": uri})})
    result = hand_over(back, manifest, result, None, driver.add_onnx)
    client = MlflowClient(uri, uri)
    assert result.version == 1
    history = client.get_metric_history(result.run_id, "train/loss")
    rows = [row for row in read_rows(tmp_path / "r" / "metrics.jsonl") if "train/loss" in row]
    assert [(m.step, m.value) for m in history] == [(row["step"], row["train/loss"]) for row in rows]
    assert client.get_run(result.run_id).info.status == "FINISHED"


def test_a_run_that_goes_on_while_its_server_is_away_stays_the_run_it_was(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun in MLflow, gone on without it: all figures end in that one run, and no other is opened."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)  # where a store that is named puts files
    there = small_config(manifest, tmp_path)
    folder, uri = str(tmp_path / "r"), f"sqlite:///{tmp_path}/server.db"
    there, away = (
        there.model_copy(update={"track": there.track.model_copy(update={"uri": at})})
        for at in (uri, "http://127.0.0.1:9")
    )
    first = follow_run(there, manifest, folder)
    assert first is not None
    first.close("FAILED")
    capsys.readouterr()

    begin_run(folder, away, manifest.digest)
    assert follow_run(away, manifest, folder) is None
    assert "sent when it is back" in capsys.readouterr().out
    assert tracked_as(folder) == first.run_id
    run, _ = one_worker(away, tmp_path / "r")
    train_epochs(run)
    _, best = load_checkpoint(tmp_path / "r" / "best")
    assert best.provenance["run_id"] == first.run_id
    rows = [row for row in read_rows(tmp_path / "r" / "metrics.jsonl") if "train/loss" in row]
    losses = [(row["step"], row["train/loss"]) for row in rows]
    assert losses
    result = hand_over(away, manifest, driver._result(run.standing, folder, manifest), None, driver.add_onnx)
    assert (result.version, tracked_as(folder)) == (None, first.run_id)

    client = MlflowClient(uri, uri)
    assert client.get_metric_history(first.run_id, "train/loss") == []
    assert run.log is not None
    run.log.uri = uri  # it is back while workers train
    assert run.log.flush(force=True)
    history = client.get_metric_history(first.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == losses

    result = hand_over(there, manifest, result, None, driver.add_onnx)
    assert (result.run_id, result.version) == (first.run_id, 1)
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert [one.info.run_id for one in client.search_runs(experiments)] == [first.run_id]
    assert len(client.get_metric_history(first.run_id, "train/loss")) == len(losses)
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_results_that_only_mlflow_lacks_are_sent_without_ray(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is through: neither a Ray nor its shards are needed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    write_run(folder, config, manifest.digest, None)
    run, _ = one_worker(config, tmp_path / "r")
    train_epochs(run)
    driver._result(run.standing, folder, manifest).write()
    monkeypatch.setattr(driver, "ray_session", None)  # would fail if it were called
    result = driver.train(config)
    assert result.version == 1
    assert TrainResult.read(folder) == result


def test_an_address_that_is_wrong_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    """Not taken for a server that comes back."""
    config = small_config(manifest, tmp_path)
    config = config.model_copy(update={"track": config.track.model_copy(update={"uri": "htp://127.0.0.1:9"})})
    folder = str(tmp_path / "r")
    with pytest.raises(ConfigError, match=r"htp://127\.0\.0\.1:9"):
        follow_run(config, manifest, folder)


def test_who_sends_figures_waits_for_the_run_in_mlflow(manifest: Manifest, tmp_path: Path) -> None:
    """It is opened while workers start; none goes on for a command that has given up."""
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    assert tracked_as(folder) is None  # a worker by itself
    write_run(folder, config, manifest.digest, "earlier")
    begin_run(folder, config, manifest.digest)
    with ThreadPoolExecutor(1) as worker:
        waiting = worker.submit(tracked_as, folder)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        write_run(folder, config, manifest.digest, "now")
        assert waiting.result(60) == "now"
    give_up(folder)  # of a run that is open already: nothing
    assert tracked_as(folder) == "now"
    begin_run(folder, config, manifest.digest)
    give_up(folder)
    with pytest.raises(Failure, match="has given up"):
        tracked_as(folder)
    begin_run(folder, config, manifest.digest)
    check_same_run(folder, config, manifest.digest)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["run_id"] == "now"


def test_steps_are_done_before_mlflow_has_the_run(manifest: Manifest, tmp_path: Path) -> None:
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    begin_run(folder, config, manifest.digest)
    run, _ = one_worker(config, tmp_path / "r")
    with ThreadPoolExecutor(1) as worker:
        training = worker.submit(train_epochs, run)
        deadline = time.monotonic() + 60
        while not read_rows(tmp_path / "r" / "metrics.jsonl") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not training.done()
        assert run.standing.total_steps
        write_run(folder, config, manifest.digest, None)
        training.result(300)
    assert run.standing.epoch == config.train.epochs


def test_a_store_that_is_refused_ends_the_workers(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train waits for its workers, and they for the run, as soon as they have figures for it."""
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    config = config.model_copy(update={"track": config.track.model_copy(update={"uri": "htp://127.0.0.1:9"})})
    ended: list[BaseException] = []

    class Trainer:
        def fit(self) -> None:
            try:
                train_epochs(one_worker(config, tmp_path / "r")[0])
            except Failure as error:
                ended.append(error)

    monkeypatch.setattr(driver, "_trainer", lambda *_: Trainer())
    with pytest.raises(ConfigError, match=r"htp://127\.0\.0\.1:9"):
        driver.fit(config, manifest, folder)
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "has given up" in str(ended)


def test_a_database_that_is_being_made_is_made_to_its_end(manifest: Manifest, tmp_path: Path) -> None:
    """Whatever ends the start meanwhile: half a database would refuse every later run."""
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    begin_run(folder, config, manifest.digest)
    following = begun(functools.partial(follow_run, config, manifest, folder))
    closed_early(following, config, folder, "KILLED")
    assert following.done()
    (run,) = Tracker(config.track, str(tmp_path)).client.search_runs(["1"])
    assert run.info.status == "KILLED"


def test_a_server_that_is_asked_for_long_does_not_hold_up_the_end(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.training.followed.PATIENCE_S", 0.1)
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    config = config.model_copy(
        update={"track": config.track.model_copy(update={"uri": "http://127.0.0.1:9"})}
    )
    begin_run(folder, config, manifest.digest)
    closed_early(Future(), config, folder, "KILLED")  # it has not answered yet
    with pytest.raises(Failure, match="has given up"):
        tracked_as(folder)


# --- a shard that is not as written ------------------------------------------------------------------------


def damaged(manifest: Manifest, copy: Path) -> Manifest:
    """A copy of a dataset with one other byte in a shard."""
    shutil.copytree(manifest.folder, copy)
    file = copy / manifest.shards("train2017")[0].path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return Manifest.load(copy)


def test_a_damaged_shard_of_a_small_dataset_is_named_before_anything_starts(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_train", None)  # would fail if it were called
    wrong = damaged(manifest, tmp_path / "shards")
    with pytest.raises(DataError, match=r"train2017-\d+.*\.parquet \(1 in all\) not as written"):
        driver.train(small_config(wrong, tmp_path))
    assert not (tmp_path / "r" / "run.json").exists()


def test_the_check_of_a_large_dataset_ends_the_run_that_it_goes_on_beside(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    whole, ended = Future[None](), threading.Event()

    class Trainer:
        def fit(self) -> None:  # begins, is told, would go on
            assert tracked_as(folder)
            whole.set_exception(DataError("a.parquet is not as written"))
            ended.wait(60)

    monkeypatch.setattr(driver, "_trainer", lambda *_: Trainer())
    with pytest.raises(DataError, match=r"a\.parquet"):
        driver.fit(config, manifest, folder, whole=whole)
    ended.set()
    (run,) = Tracker(config.track, str(tmp_path)).client.search_runs(["1"])
    assert run.info.status == "FAILED"


def test_a_run_does_not_end_before_its_shards_are_checked(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = small_config(manifest, tmp_path), str(tmp_path / "r")
    whole, through = Future[None](), threading.Event()

    class Trainer:
        def fit(self) -> Any:
            run, _ = one_worker(config, tmp_path / "r")
            through.set()
            return SimpleNamespace(return_value=run.standing)

    monkeypatch.setattr(driver, "_trainer", lambda *_: Trainer())
    with ThreadPoolExecutor(1) as command:
        ending = command.submit(driver.fit, config, manifest, folder, whole=whole)
        assert through.wait(60)
        with pytest.raises(TimeoutError):
            ending.result(1)
        whole.set_result(None)
        ending.result(60)
    assert "waiting until all shards are checked" in capsys.readouterr().out


# --- a disk without room ----------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 KB, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_a_sentence_and_what_was_whole_stays(
    manifest: Manifest, tmp_path: Path, small_files: None
) -> None:
    """Weights do not fit, nor a checkpoint; metrics.jsonl does, with every row."""
    config = small_config(manifest, tmp_path)
    write_run(str(tmp_path / "run"), config, manifest.digest, None)
    run, _ = one_worker(config, tmp_path / "run")
    with (
        pytest.raises(DataError, match=r"cannot be written \(File too large\)\. Free space.*same command"),
        driver.told_in_a_sentence(str(tmp_path / "run"), 3),
    ):
        train_epochs(run)
    assert not (tmp_path / "run" / "best").exists()
    assert reached_step(str(tmp_path / "run")) == 3
    assert saved_step(str(tmp_path / "run")) == 0


def test_a_checkpoint_that_found_no_room_says_so(
    manifest: Manifest, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save itself would speak of a position in the file."""
    from pipelines.training import state

    run, _ = one_worker(small_config(manifest, tmp_path), tmp_path / "run")
    with pytest.raises(OSError, match="File too large"):
        state.save(run)


def test_rows_without_room_are_an_error(tmp_path: Path, small_files: None) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")

    def fill() -> None:
        for step in range(5000):
            log.write(step, {"train/loss": 0.1234567})

    with pytest.raises(OSError, match="File too large"):
        fill()


# --- the real command -------------------------------------------------------------------------------------


def started(manifest: Manifest, folder: Path, storage: Path, **train: Any) -> subprocess.Popen[str]:
    """`hrnet train` of a small network by two workers, begun; MLflow's file beside the storage."""
    config = small_config(manifest, storage, num_workers=2, cpus_per_worker=0.5, **train)
    (folder / "small.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude={"config_name"})))
    argv = [sys.executable, "-m", "pipelines.cli", "train", str(folder / "small.yaml"), "--ray.num-cpus", "2"]
    return subprocess.Popen(
        [*argv, "--track.uri", f"sqlite:///{folder}/mlflow.db"],
        stdout=(folder / "out").open("w"),
        stderr=(folder / "err").open("w"),
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
    )


def wait_until(true: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, "the command ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_then_sigterm_then_the_same_command(manifest: Manifest, tmp_path: Path) -> None:
    """What is read on the terminal is ours alone: a sentence for each, no traceback, no banner."""
    import psutil
    from mlflow import MlflowClient

    run = tmp_path / "runs" / "r"
    process = started(manifest, tmp_path, tmp_path / "runs", epochs=60, max_failures=3)
    wait_until(lambda: saved_step(str(run)) >= 3, process)
    workers = [
        one for one in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in one.name()
    ]
    workers = workers or [
        one
        for one in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(one.cmdline())
    ]
    assert len(workers) == 2
    workers[1].kill()
    out = tmp_path / "out"
    wait_until(lambda: "restart 1 of 3" in out.read_text(), process)
    at = saved_step(str(run))
    wait_until(lambda: saved_step(str(run)) > at, process)  # it goes on
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    first, *lines = [re.sub(r"^\(\w+ pid=\d+\) ", "", line) for line in out.read_text().splitlines()]
    assert first == "starting Ray ..."
    assert [
        line for line in lines if not re.match(r" *epoch \d+[/,]|worker [01] was lost \(its pro", line)
    ] == []
    told = (tmp_path / "err").read_text()
    assert re.fullmatch(
        rf"hrnet train: stopped by SIGTERM\. {run}: The run stands after epoch \d+, batch \d; the same "
        r"command goes on from the checkpoint of epoch \d+, batch 3\.\n",
        told,
    )
    assert "actor died unexpectedly" in (run / "errors.log").read_text()
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    with quiet_mlflow():
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        assert client.get_run(run_id).info.status == "KILLED"

    epochs = saved_step(str(run)) // 3
    refused = started(manifest, tmp_path, tmp_path / "runs", epochs=epochs + 1, lr=0.5)
    assert refused.wait(timeout=120) == 2
    assert "train.lr was 0.001, now 0.5" in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_a_full_disk_under_the_command(manifest: Manifest, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (mounted := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    try:
        process = started(manifest, tmp_path, disk, max_failures=3)
        assert process.wait(timeout=300) == 2
        told = (tmp_path / "err").read_text()
        assert re.fullmatch(
            rf"hrnet train: {disk}/r.*: cannot be written \(No space left on device\)\. Free space, .*\n",
            told,
        )
        assert "lost" not in (tmp_path / "out").read_text(), "not tried again in vain"
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = started(manifest, tmp_path, disk, max_failures=3)
        assert again.wait(timeout=300) == 0, (tmp_path / "err").read_text()
        assert (disk / "r" / "result.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
