"""MLflow store, metric log, registry: against MLflow's own client on a fresh SQLite file."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hrnet_core.errors import CheckpointError, ConfigError
from pipelines.settings.config import TrackSettings
from pipelines.settings.config_file import load_config
from pipelines.tracking import registry
from pipelines.tracking.checkpoints import local_checkpoint
from pipelines.tracking.metric_log import MetricLog, read_rows
from pipelines.tracking.registry import Registry, champion_of, record_evaluation
from pipelines.tracking.store import StoreAway, Tracker, quiet_mlflow, record_dataset, uri_of
from pipelines.training.followed import about_version
from pipelines.training.run_folder import TrainResult

DATASET = {"source": "/data/shards", "digest": "ab" * 32, "training": "train2017", "validation": "val2017"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracker(storage: Path) -> Tracker:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        return Tracker(TrackSettings(), storage)


def checkpoint_folder(folder: Path, sha256: str) -> Path:
    """A stand-in: tracking reads the weights' sha256 only."""
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps({"weights_sha256": sha256}))
    (folder / "model.safetensors").write_bytes(sha256.encode())
    return folder


def open_run(tracker: Tracker, **extra: Any) -> str:
    return tracker.open_run("r", {"train": {"lr": 0.1}}, {"dataset_digest": "ab" * 32}, DATASET, **extra)


def test_a_run_holds_parameters_tags_and_the_dataset(tracker: Tracker, storage: Path) -> None:
    run_id = open_run(tracker)
    run = tracker.client.get_run(run_id)
    assert (storage / "mlflow.db").is_file()
    assert run.info.artifact_uri.startswith((storage.resolve() / "mlartifacts").as_uri())
    assert run.data.params == {"train.lr": "0.1"}
    assert run.data.tags["dataset_digest"] == "ab" * 32
    experiment = tracker.client.get_experiment(run.info.experiment_id)
    assert experiment.name == "hrnet"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    inputs = run.inputs.dataset_inputs
    assert {i.dataset.digest for i in inputs} == {("ab" * 32)[:36]}
    contexts = {i.dataset.name: i.tags[0].value for i in inputs}
    assert contexts == {"train2017": "training", "val2017": "validation"}
    tracker.close_run(run_id, "FAILED")
    assert tracker.client.get_run(run_id).info.status == "FAILED"
    # The same run goes on; a run that is gone is replaced.
    assert open_run(tracker, run_id=run_id) == run_id
    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    assert open_run(tracker, run_id="0" * 32) not in (run_id, "0" * 32)


@pytest.mark.parametrize(
    "source", ["/data/shards", "s3://team/shards", "gs://team/shards", "az://team/shards"]
)
def test_a_dataset_lies_where_mlflow_says_so_itself(tracker: Tracker, source: str) -> None:
    """Of Azure's places MLflow's own resolver knows nothing."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    digest = hashlib.sha256(source.encode()).hexdigest()  # a dataset that MLflow has keeps its place
    run_id = open_run(tracker)
    tracker.log_dataset(run_id, source, digest, [("inspection", "train2017")])
    logged = [one.dataset for one in tracker.client.get_run(run_id).inputs.dataset_inputs]
    (found,) = [one for one in logged if digest.startswith(one.digest)]
    assert (found.name, json.loads(found.source)) == ("train2017", {"uri": source})
    if not source.startswith("az:"):
        with quiet_mlflow():
            theirs = resolve_dataset_source(source)
        entity = MetaDataset(theirs, "train2017", found.digest)._to_mlflow_entity()
        assert (found.source_type, found.source) == (entity.source_type, entity.source)


def test_metrics_reach_mlflow_once_when_training_goes_back(tracker: Tracker, tmp_path: Path) -> None:
    run_id = open_run(tracker)
    file = tmp_path / "metrics.jsonl"
    first = MetricLog(file, -1, tracker.uri, run_id)
    for step in range(5):
        first.write(step, {"train/loss": step / 10})
    assert first.flush()
    first.write(5, {"train/loss": 0.5})  # on disk, not sent: the process dies here
    with file.open("a") as out:
        out.write('{"step": 6, "tr')
    again = MetricLog(file, 2, tracker.uri, run_id)  # the checkpoint was of step 2
    assert [row["step"] for row in again.rows] == [0, 1, 2]
    for step in range(3, 8):
        again.write(step, {"train/loss": step / 10, "val_gt/AP": 0.5})
    assert again.flush()
    history = tracker.client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, s / 10) for s in range(8)]
    assert [m.step for m in tracker.client.get_metric_history(run_id, "val_gt/AP")] == [3, 4, 5, 6, 7]
    assert [row["step"] for row in read_rows(file)] == list(range(8))


def test_a_server_that_goes_away_does_not_stop_training(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    run_id = open_run(tracker)
    file = tmp_path / "metrics.jsonl"
    metrics = MetricLog(file, -1, tracker.uri, run_id)
    metrics.write(0, {"train/loss": 1.0})
    assert metrics.flush()

    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", refused)
        metrics.write(1, {"train/loss": 0.5})
        assert not metrics.flush()
        metrics.write(2, {"train/loss": 0.25})
    assert not metrics.flush()  # not asked again at once
    assert [row["step"] for row in read_rows(file)] == [0, 1, 2]
    replay = MetricLog(file, 2, tracker.uri, run_id)
    assert replay.flush(force=True)
    history = tracker.client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_a_version_is_found_by_alias_number_and_folder(
    tracker: Tracker, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    run_id = open_run(tracker)
    best = checkpoint_folder(tmp_path / "best", "5" * 64)
    models = Registry(tracker)
    number = models.register(run_id, best, {"val_gt/AP": "0.5"})
    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    version = models.version(str(best))
    assert version is not None
    assert version.version == number
    assert version.run_id == run_id
    assert version.tags["val_gt/AP"] == "0.5"
    assert models.version(champion_of("hrnet-pose")) is None
    models.set_champion(version)
    name = f"models:/hrnet-pose/{number}"
    for ref in ("models:/hrnet-pose@champion", name, str(number), "5" * 64, None):
        found = models.version(ref)
        assert found is not None
        assert found.version == number
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with local_checkpoint(None, TrackSettings(), storage) as here:
        assert (here.name, here.version) == ("models:/hrnet-pose@champion", f"hrnet-pose/{number}")
        assert not here.copied
        folder = here.folder
    assert (folder / "model.safetensors").read_bytes() == b"5" * 64
    stored = {f.name for f in folder.parents[1].rglob("*")}
    assert {"model.py", "mlflow_model.py"} <= stored  # hrnet_core travels with it
    assert not {name for name in stored if name.endswith((".pkl", ".pickle"))}
    for missing in ("models:/hrnet-pose/99", "models:/other@champion", "models:/hrnet-pose"):
        with (
            pytest.raises(CheckpointError, match=rf"{missing}: not in the MLflow store"),
            local_checkpoint(missing, TrackSettings(), storage),
        ):
            pass


def test_a_page_says_who_trained_by_which_job_and_what_a_version_is(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Created by" and "Source" of MLflow's page are these tags; `ray job logs` takes the job's name."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bob")
    # What Ray 2.60 sets for the driver of a submitted job.
    job = {"runtime_env": {}, "metadata": {"job_submission_id": "train-7", "job_name": "train-7"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    run_id = open_run(tracker)
    tags = tracker.client.get_run(run_id).data.tags
    told = {name: tags[name] for name in ("mlflow.user", "mlflow.source.name", "ray_job")}
    assert told == {"mlflow.user": "bob", "mlflow.source.name": "hrnet", "ray_job": "train-7"}
    result = TrainResult(
        run_name="w32", run_id=run_id, folder="runs/w32", best_ap=0.7437, best_epoch=190, epochs=210, step=1,
        samples=1, seconds=1.0, dataset_digest="ab" * 32, codec="udp", input_size="192x256",
        best_checkpoint="runs/w32/best", version=None,
    )  # fmt: skip
    about = about_version(load_config("w32_256x192_udp"), result)
    best = checkpoint_folder(tmp_path / "best", "9" * 64)
    number = Registry(tracker).register(run_id, best, {}, about)
    said = tracker.client.get_model_version("hrnet-pose", str(number)).description
    assert said.startswith("w32: val_gt/AP 0.744 ")
    for part in ("width 32, 192x256, codec udp", "epoch 190 of 210", "`runs/w32/best`"):
        assert part in said
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert "ray_job" not in tracker.client.get_run(open_run(tracker)).data.tags


def test_a_server_gives_a_copy_that_goes_with_the_block(
    tracker: Tracker, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is named is not ours to read in; what its files cost here is given back."""
    best = checkpoint_folder(tmp_path / "best", "8" * 64)
    named = TrackSettings(uri=tracker.uri, registered_model="other")
    number = Registry(Tracker(named, tmp_path)).register(open_run(tracker), best, {})
    with local_checkpoint(f"models:/other/{number}", named, tmp_path) as here:
        assert (here.version, here.copied) == (f"other/{number}", True)
        assert (here.folder / "model.safetensors").read_bytes() == b"8" * 64
    assert not here.folder.exists()
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", away)
    with (
        pytest.raises(CheckpointError, match=rf"other/{number}: .*http://\.\.\.@host") as caught,
        local_checkpoint(f"models:/other/{number}", named, tmp_path),
    ):
        pass
    assert "secret" not in str(caught.value)


def away(*_: Any, **__: Any) -> None:
    raise ConnectionError("API request to http://user:secret@host/api failed")


def test_an_evaluation_stands_at_version_and_run(tracker: Tracker, storage: Path, tmp_path: Path) -> None:
    run_id = open_run(tracker)
    best = checkpoint_folder(tmp_path / "best", "6" * 64)
    models = Registry(tracker)
    number = models.register(run_id, best, {})
    protocol = {"data_digest": "d", "boxes": "gt", "flip_test": True, "preset": "official", "images": 4}
    picture = tmp_path / "overlay.txt"
    picture.write_text("x")
    name = record_evaluation(str(best), {"AP": 0.61, "AP50": 0.9}, protocol, [picture], storage=storage)
    assert name == f"hrnet-pose/{number}"
    run = tracker.client.get_run(run_id)
    assert run.data.metrics == {"eval_gt/AP": 0.61, "eval_gt/AP50": 0.9}
    version = models.version(str(number))
    assert version is not None
    (written,) = registry.evaluations(version).values()
    assert written == {"protocol": protocol, "stats": {"AP": 0.61, "AP50": 0.9}}
    unknown = checkpoint_folder(tmp_path / "other", "7" * 64)
    assert record_evaluation(str(unknown), {"AP": 0.1}, protocol, storage=storage) is None


@pytest.mark.parametrize("field", registry.DECISIVE)
def test_only_equal_protocols_are_comparable(field: str) -> None:
    protocol = {"data_digest": "d", "boxes": "gt", "flip_test": True, "preset": "official"}
    assert registry.comparable({**protocol, "seconds": 3}) == registry.comparable(protocol)
    assert registry.comparable({**protocol, field: "other"}) != registry.comparable(protocol)


def test_a_cluster_without_a_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        Tracker(TrackSettings(), tmp_path)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_store_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"http://\.\.\.@127\.0\.0\.1:9 does not answer") as caught:
        Tracker(TrackSettings(uri="http://user:secret@127.0.0.1:9"), tmp_path)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_away_is_told_in_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither urllib3's retries nor its long way of saying the operating system's three words."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    requests = logging.getLogger("urllib3.connectionpool")
    before = requests.level
    with pytest.raises(StoreAway, match=r"127\.0\.0\.1:9 does not answer \(Connection refused\)\. Start"):
        Tracker(TrackSettings(uri="http://user:secret@127.0.0.1:9"), tmp_path)
    assert [record.getMessage() for record in caplog.records if record.name == requests.name] == []
    assert requests.level == before


def test_a_server_that_is_away_later_is_told_in_as_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log = MetricLog(tmp_path / "metrics.jsonl", uri="http://user:secret@127.0.0.1:9", run_id="r")
    log.write(1, {"train/loss": 1.0})
    assert not log.flush()
    told = capsys.readouterr().out
    assert told.startswith(
        "MLflow http://...@127.0.0.1:9 does not answer (Connection refused). Training goes on"
    )


def test_a_server_that_hangs_up_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """requests keeps that cause among its arguments."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            asked, _ = server.accept()
            with asked:
                asked.recv(65536)

        threading.Thread(target=hang_up, daemon=True).start()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(StoreAway, match=r"answer \(Remote end closed connection without response\)\. S"):
            Tracker(TrackSettings(uri=uri), tmp_path)


def answering(*, code: int, said: str, to: str) -> ThreadingHTTPServer:
    """A server that knows the experiment hrnet, and answers `code` where `to` is in the path."""

    class Handler(BaseHTTPRequestHandler):
        def do_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            refused = to in self.path
            body = said if refused else json.dumps({"experiment": {"experiment_id": "1", "name": "hrnet"}})
            self.send_response(code if refused else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(
    ("user", "code", "said", "to", "told"),
    [
        # What MLflow 3.17.2 with --app-name basic-auth, and its check of the Host header, answered.
        (None, 401, "You are not authenticated.", "/", "and got none. Set MLFLOW_TRACKING_USERNAME"),
        ("bob", 401, "You are not authenticated.", "/", "did not take those of user bob. Set MLFLOW"),
        (None, 403, "Invalid Host header - possible DNS rebinding attack detected", "/", "_ALLOWED_HOSTS"),
        (
            "bob",
            403,
            "Permission denied",
            "/runs/create",
            "does not let user bob do that. Have its admin",
        ),
    ],
)
def test_a_server_that_wants_another_user_is_told_as_that(
    user: str | None, code: int, said: str, to: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not away, and nobody is to report it as a defect."""
    for name, value in (("USERNAME", user), ("PASSWORD", "secret" if user else None)):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
        if value:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    with answering(code=code, said=said, to=to) as server:
        uri = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ConfigError) as caught:
            Tracker(TrackSettings(uri=uri), "runs").open_run("r", {}, {}, DATASET)
        server.shutdown()
    assert not isinstance(caught.value, StoreAway)
    assert str(caught.value).startswith(f"the MLflow server {uri} ")
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


def test_who_may_not_read_or_complete_what_others_made_is_told_so(tmp_path: Path) -> None:
    """A dataset's run may be another user's, an experiment or model closed to us."""
    counts = {"people": 1, "photos": 1, "variants": 1, "shards": 1, "bytes": 1, "rejected": {}}
    card = {"digest": "ab" * 32, "splits": {"val2017": counts}, "config": {}}

    def refused(to: str, ask: Callable[[TrackSettings], object]) -> None:
        with answering(code=403, said="Permission denied", to=to) as server:
            uri = f"http://127.0.0.1:{server.server_address[1]}"
            with pytest.raises(ConfigError, match=rf"^the MLflow server {uri} does not let us do that\. H"):
                ask(TrackSettings(uri=uri))
            server.shutdown()

    refused("/experiments/get-by-name", lambda track: record_dataset(card, [], "/data/shards", track))
    refused("/runs/search", lambda track: Tracker(track, tmp_path).runs_on("ab" * 32))
    refused("/runs/log-inputs", lambda track: record_dataset(card, [], "/data/shards", track))
    refused("/model-versions/get", lambda track: Registry(Tracker(track, tmp_path)).version("1"))


@pytest.mark.parametrize("name", ["", "x" * 501])
def test_an_experiment_that_mlflow_does_not_take_is_told_by_its_setting(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--track\.experiment '.*': MLflow takes no experiment .* Choose"):
        Tracker(TrackSettings(experiment=name), tmp_path).open_run("r", {}, {}, DATASET)


def test_who_may_not_make_an_experiment_is_told_so(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def denied(*_: Any, **__: Any) -> str:
        raise mlflow.MlflowException("Permission denied", PERMISSION_DENIED)

    monkeypatch.setattr(mlflow.MlflowClient, "create_experiment", denied)
    monkeypatch.setattr(tracker, "settings", TrackSettings(experiment="theirs"))
    with pytest.raises(ConfigError, match="does not let us do that"):
        open_run(tracker)


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ("sqlite:///rel.db", "sqlite:///{here}/rel.db"),
        ("sqlite:///../a/rel.db?timeout=9", "sqlite:///{here.parent}/a/rel.db?timeout=9"),
        ("file:mlruns", "file:{here}/mlruns"),
        ("./mlruns", "{here}/mlruns"),
        *((uri, uri) for uri in ("sqlite:////abs/rel.db", "sqlite:///:memory:", "sqlite://", "/abs/mlruns")),
        *((uri, uri) for uri in ("file:///abs/mlruns", "http://host:5000", "databricks", "databricks://me")),
        *((uri, uri) for uri in ("postgresql://user:secret@host/db", "sqlite:///file:rel.db?uri=true")),
    ],
)
def test_a_store_in_a_file_is_the_same_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, taken: str
) -> None:
    """Workers stand in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    taken = taken.format(here=tmp_path)
    assert uri_of(TrackSettings(uri=named), "runs") == taken
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    assert uri_of(TrackSettings(), "runs") == taken


def test_a_database_file_cannot_lie_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"s3://bucket/runs.*--run\.storage"):
        Tracker(TrackSettings(), "s3://bucket/runs")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_drivers_that_start_together_share_one_database(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    drivers = [context.Process(target=Tracker, args=(TrackSettings(), tmp_path)) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0, 0, 0, 0]
    assert Tracker(TrackSettings(), tmp_path).client.search_experiments(max_results=1)


def test_a_store_does_not_become_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow writes the store it is given into the environment; a second Tracker must not read it there, nor
    may a process that is started later."""
    variables = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    for name in ("one", "two"):
        assert Tracker(TrackSettings(), tmp_path / name).uri.endswith(f"{name}/mlflow.db")
    assert not [variable for variable in variables if variable in os.environ]
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://theirs")
    Tracker(TrackSettings(), tmp_path / "three")
    assert os.environ["MLFLOW_REGISTRY_URI"] == "http://theirs"
