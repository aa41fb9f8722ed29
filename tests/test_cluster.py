"""ray_cluster.yaml: what Ray's own validator, bin packing and command-line parser make of it. No network."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from free_ports import free_port

ROOT = Path(__file__).parents[1]
FILE = ROOT / "ray_cluster.yaml"


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The config with Ray's defaults filled in, as `ray up` would use it; raises what Ray raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def cluster(written: dict[str, Any]) -> dict[str, Any]:
    return prepared(written)


def ray_start(commands: list[str]) -> tuple[str, dict[str, Any]]:
    """The one start command with `ray start`, and what Ray's own parser reads from its flags."""
    from ray.scripts.scripts import start

    (command,) = [c for c in commands if "ray start" in c]
    flags = shlex.split(command.split("ray start", 1)[1])
    return command, start.make_context("ray start", flags).params


# --- accepted, and a slip is not -------------------------------------------------------------


@pytest.mark.parametrize(
    "slip",
    [
        lambda c: c.update(max_worker=c.pop("max_workers")),
        lambda c: c.update(worker_nodes={}, autoscaling_mode="default"),
        lambda c: c["available_node_types"]["gpu"].update(min_worker=1),
        lambda c: c["available_node_types"]["gpu"].pop("resources"),
        lambda c: c["available_node_types"]["gpu"].update(resources={"GPU": "one"}),
        lambda c: c["available_node_types"]["gpu"].update(min_workers=c["max_workers"] + 1),
        lambda c: c.update(head_node_type="haed"),
        lambda c: c["auth"].update(ssh_usr="ubuntu"),
    ],
)
def test_ray_refuses_a_slip_in_the_file(
    written: dict[str, Any], cluster: dict[str, Any], slip: Callable[[dict[str, Any]], object]
) -> None:
    import jsonschema

    changed = copy.deepcopy(written)
    slip(changed)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        prepared(changed)


def test_no_command_is_left_to_the_defaults_of_ray(cluster: dict[str, Any]) -> None:
    """They install a nightly Ray and bind the dashboard to all interfaces."""
    commands = "\n".join(c for key, value in cluster.items() if key.endswith("_commands") for c in value)
    assert "pip install --quiet -c ~/hrnet/constraints.txt" in commands
    for unwanted in ("ray-wheels", "which ray", "--dashboard-host=0.0.0.0", "anaconda"):
        assert unwanted not in commands


def test_files_that_go_to_the_nodes_are_there_and_install_the_project(written: dict[str, Any]) -> None:
    import tomllib

    mounts = written["file_mounts"]
    sources = {ROOT / local for local in mounts.values() if not local.startswith("~")}
    assert all(source.exists() for source in sources), [str(s) for s in sources if not s.exists()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    needed = {*packages, "pyproject.toml", "constraints.txt", project["project"]["readme"]}
    needed |= {*project["project"]["license-files"]}
    assert needed <= {s.name for s in sources}
    assert all(remote == f"~/hrnet/{local}" for remote, local in mounts.items() if not local.startswith("~"))


# --- who works where -------------------------------------------------------------------------


def test_node_types(cluster: dict[str, Any]) -> None:
    from ray._private.label_utils import validate_node_labels

    types = cluster["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert cluster["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["head"]["max_workers"] == 0
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert types["cpu"]["resources"].get("GPU", 0) == 0
    for name in ("cpu", "gpu"):
        assert types[name]["min_workers"] == 0
        assert types[name]["max_workers"] >= 1
        assert types[name]["resources"]["CPU"] >= 1
    assert sum(t["max_workers"] for t in types.values()) <= cluster["max_workers"]
    labels = {name: t["labels"]["hrnet-pool"] for name, t in types.items()}
    assert labels == {name: name for name in types}
    for t in types.values():
        validate_node_labels(t["labels"])
        assert t["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert t["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True


def nodes_for(cluster: dict[str, Any], demand: list[dict[str, float]]) -> tuple[dict[str, int], int]:
    """The nodes that Ray's autoscaler would start for this demand, and how much of it would stay unserved."""
    from functools import partial

    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    scorer = partial(_default_utilization_scorer, node_availability_summary=None)
    types, head = cluster["available_node_types"], cluster["head_node_type"]
    started, unserved = get_nodes_for(types, {head: 1}, head, cluster["max_workers"], demand, scorer)
    return dict(started), len(unserved)


def test_the_autoscaler_starts_what_each_stage_needs(cluster: dict[str, Any]) -> None:
    # Preprocess: tasks of one CPU. 16 fit on a node; never a GPU node, and nothing on the head.
    assert nodes_for(cluster, [{"CPU": 1}]) == ({"cpu": 1}, 0)
    assert nodes_for(cluster, [{"CPU": 1}] * 40) == ({"cpu": 3}, 0)
    # Train: four workers with a GPU and its share of the CPUs. Serve: one replica.
    assert nodes_for(cluster, [{"CPU": 1, "GPU": 1}] * 4) == ({"gpu": 4}, 0)
    assert nodes_for(cluster, [{"CPU": 8, "GPU": 1}]) == ({"gpu": 1}, 0)
    # The limits hold: a fifth GPU is not to be had.
    assert nodes_for(cluster, [{"CPU": 1, "GPU": 1}] * 5) == ({"gpu": 4}, 1)


def test_the_head_offers_no_cpu_and_gpu(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray resolves it on the node: from the flags, and from the override that `ray up` exports."""
    import json

    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    _, flags = ray_start(cluster["head_start_ray_commands"])
    assert (flags["num_cpus"], flags["num_gpus"]) == (0, 0)
    monkeypatch.setenv(
        "RAY_OVERRIDE_RESOURCES", json.dumps(cluster["available_node_types"]["head"]["resources"])
    )
    spec = ResourceAndLabelSpec(num_cpus=4, num_gpus=1).resolve(is_head=True, node_ip_address="127.0.0.1")
    assert (spec.num_cpus, spec.num_gpus) == (0, 0)


# --- who gets in -----------------------------------------------------------------------------


def test_mlflow_behind_one_address_of_the_machine_is_found_there(tmp_path: Path) -> None:
    """A stand-in for MLflow's program listens where it is told to. It was asked for on 127.0.0.1, so after
    two minutes the script said that MLflow had not started, and `ray up` ended."""
    program = tmp_path / "bin" / "mlflow"
    program.parent.mkdir()
    program.write_text(
        "#!/usr/bin/env bash\n"  # mlflow server --host H --port P ...
        f"touch {tmp_path}/health; exec timeout 60 python3 -m http.server --bind $3 -d {tmp_path} $5\n"
    )
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_HOST": "127.0.0.2",
        "MLFLOW_PORT": str(free_port()),
        "http_proxy": "http://127.0.0.1:9",  # a company's: this machine is not behind it
    }
    command = ["bash", str(ROOT / "infra/mlflow.sh"), "--background", str(tmp_path / "state")]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=50, check=True
    ).stdout
    assert f"MLflow listens on 127.0.0.2:{environment['MLFLOW_PORT']}" in said
    os.killpg(int(said.partition("process ")[2].partition(",")[0]), signal.SIGTERM)


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_a_token_is_on_for_every_node(cluster: dict[str, Any], commands: str) -> None:
    command, _ = ray_start(cluster[commands])
    before = command.split("ray start")[0]
    assert re.search(r"\bexport\b[^;]*\bRAY_AUTH_MODE=token\b", before)
    # The venv's python is what a job's entrypoint finds, and the tracking server is known to every process.
    assert re.search(r"\bexport PATH=\$HOME/hrnet-env/bin:\$PATH\b", before)
    assert re.search(r"\bexport\b[^;]*\bMLFLOW_TRACKING_URI=http://[^;]+:5000;", before)
    assert "unset OMP_NUM_THREADS" in before
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    setup = cluster[commands.replace("start_ray", "setup")]
    assert any("chmod 600 ~/.ray/auth_token" in c for c in setup)


def test_nothing_listens_to_the_world(cluster: dict[str, Any]) -> None:
    _, head = ray_start(cluster["head_start_ray_commands"])
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["head"] is True
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    # No further hole in the security group: Ray opens SSH alone.
    assert "security_group" not in cluster["provider"]
    # MLflow alone listens beyond localhost, for the workers.
    start = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert [c for c in start if "0.0.0.0" in c] == [c for c in start if "infra/mlflow.sh" in c]


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_objects_spill_to_a_named_folder(cluster: dict[str, Any], commands: str) -> None:
    command, flags = ray_start(cluster[commands])
    assert flags["object_spilling_directory"] == "$HOME/spill"
    assert "mkdir -p ~/spill" in command
    assert flags["disable_usage_stats"] is True


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_dashboard_that_asks_for_no_token_is_warned_of(mode: str) -> None:
    """Of a real head, to which each job brings the right token."""
    import shutil
    import tempfile

    from ray_head import Head

    folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
    (folder / "join.py").write_text(JOIN)
    try:
        with Head(folder, environment={"RAY_AUTH_MODE": mode}).running() as head:
            job = head.submit("join", "python", str(folder / "join.py"))
            said = job.communicate(timeout=300)[0]
            warning = f"warning: whoever reaches http://{head.dashboard.removeprefix('http://')} runs code"
    finally:
        shutil.rmtree(folder)
    assert job.returncode == 0, said
    assert "joined" in said.splitlines(), said
    assert said.count(warning) == (mode == "disabled"), said


JOIN = """
from pipelines.cluster.session import ray_session
from pipelines.settings.config import RaySettings
with ray_session(RaySettings()):
    print("joined")
"""


@pytest.mark.parametrize(("status", "lines"), [(200, 1), (401, 0), (403, 0)])
def test_what_a_dashboard_answers_without_a_token(
    status: int, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from pipelines.cluster.session import warn_unguarded

    asked = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        warn_unguarded(f"127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert asked == [("/api/jobs/", None)]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert all("RAY_AUTH_MODE=token" in line for line in said)


def test_no_dashboard_is_not_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    from free_ports import free_port

    from pipelines.cluster.session import warn_unguarded

    for nobody in ("", f"127.0.0.1:{free_port()}"):
        warn_unguarded(nobody)
    assert capsys.readouterr().out == ""


# --- under Ray's own autoscaler --------------------------------------------------------------

ASK = """
import ray
ray.init(logging_level="ERROR")
pool = lambda: ray.get_runtime_context().get_node_labels()["hrnet-pool"]
assert "CPU" not in ray.cluster_resources()
print("task:", ray.get(ray.remote(num_cpus=1)(pool).remote()))
print("gpu task:", ray.get(ray.remote(num_cpus=1, num_gpus=1)(pool).remote()))
print("labelled:", ray.get(ray.remote(num_cpus=1, label_selector={"hrnet-pool": "gpu"})(pool).remote()))
"""


@pytest.mark.slow
def test_workers_come_when_they_are_asked_for(written: dict[str, Any]) -> None:
    """The node types of the file on a real head and autoscaler, whose machines are processes on this one."""
    import json
    import shutil
    import tempfile

    from ray._private.services import get_node_ip_address
    from ray_head import Head

    folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
    head_id, file = "f" * 56, folder / "cluster.json"
    head = Head(
        folder,
        ["--num-cpus=0", "--num-gpus=0", f"--autoscaling-config={file}"],
        {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
    )
    config = prepared(written)
    types = config["available_node_types"]
    types["ray.head.default"] = types.pop("head")  # the name that this provider knows
    for node_type in types.values():
        node_type["resources"]["object_store_memory"] = 100_000_000
    config |= {key: [] for key in config if key.endswith("_commands")}
    config |= {"head_node_type": "ray.head.default", "file_mounts": {}}
    config["provider"] = {
        "type": "fake_multinode",
        "gcs_address": f"{get_node_ip_address()}:{head.ports['port']}",
        "head_node_id": head_id,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    file.write_text(json.dumps(config))
    (folder / "ask.py").write_text(ASK)
    try:
        with head.running():
            job = head.submit("ask", "python", str(folder / "ask.py"))
            said = job.communicate(timeout=300)[0]
    finally:
        shutil.rmtree(folder)
    assert job.returncode == 0, said
    for line in ("task: cpu", "gpu task: gpu", "labelled: gpu"):
        assert line in said.splitlines(), said


# --- work goes to the nodes that were named ------------------------------------------------------


def test_a_cluster_without_the_labelled_nodes_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room on other nodes is none; the same settings on a Ray that is started here name nothing."""
    from hrnet_core.errors import ConfigError
    from pipelines.cluster.session import require, selector
    from pipelines.settings.config import RaySettings

    asked: list[dict[str, Any]] = []
    node = {"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {"hrnet-pool": "cpu"}}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda **asks: asked.append(asks))
    clock = SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic)
    monkeypatch.setattr("pipelines.cluster.session.time", clock)  # not that of other threads
    settings = RaySettings(labels={"hrnet-pool": "gpu"}, wait_minutes=1e-4)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        ConfigError, match=r"on nodes labelled hrnet-pool=gpu; after .* has 0 CPUs and 0 GPUs"
    ):
        require(settings, 2, 1, 0, "hrnet train")
    assert asked[0] == {
        "bundles": [{"CPU": 1}] * 2,
        "bundle_label_selectors": [{"hrnet-pool": "gpu"}] * 2,
    }
    assert asked[-1] == {"bundles": []}
    require(settings.model_copy(update={"labels": {"hrnet-pool": "cpu"}}), 8, 1, 0, "hrnet train")
    monkeypatch.delenv("RAY_ADDRESS")
    assert selector(settings) == {}
    require(settings, 8, 1, 0, "hrnet train")


@pytest.mark.parametrize("value", ["in(a,b)", "!gpu", "", "a b"])
def test_a_label_is_a_plain_value(value: str) -> None:
    from pydantic import ValidationError

    from pipelines.settings.config import RaySettings

    with pytest.raises(ValidationError, match=r"hrnet-pool .*: give the label's value"):
        RaySettings(labels={"hrnet-pool": value})


def test_replicas_run_on_the_nodes_that_were_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the options that Serve makes actors with."""
    from test_deploy import save

    from hrnet_core import memory
    from pipelines import deploy
    from pipelines.settings.config import RaySettings, RunSettings, ServeSettings
    from serve.app import deployment
    from serve.settings import ServeArgs

    told: list[ServeArgs] = []

    def bring_up(args: ServeArgs, *_: Any) -> str:
        told.append(args)
        return "http://127.0.0.1:8000"

    monkeypatch.setattr(deploy.live, "bring_up", bring_up)
    monkeypatch.setattr(deploy, "_remove_old_copies", lambda *_: None)  # asks what is live
    nodes_without(tmp_path / "nothing", monkeypatch)
    checkpoint, run = str(save(tmp_path / "tiny", 0)), RunSettings(storage=str(tmp_path / "runs"))
    for labels in ({"hrnet-pool": "gpu"}, {}):
        settings = RaySettings(labels=labels)
        deploy.deploy(checkpoint, ServeSettings(), run=run, ray_settings=settings)
        options = deployment(told[-1]).ray_actor_options
        assert options is not None
        assert options.get("label_selector", {}) == labels
        assert options["runtime_env"] == {"env_vars": memory.PASSES}  # of a CPU's passes


# --- what not all nodes have ------------------------------------------------------------------


def test_a_path_that_only_the_driver_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against nodes with a disk of nothing; tests/cluster asks real ones."""
    from hrnet_core.errors import ConfigError
    from pipelines.cluster import shared_paths

    asked: list[list[str]] = []

    def nothing(files: list[str]) -> list[tuple[str, list[str]]]:
        asked.append(files)
        assert all(Path(file).exists() for file in files)
        return [("w1 (10.0.0.2)", files)] if files else []

    monkeypatch.setattr(shared_paths, "_missing_on_nodes", nothing)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    coco, runs = tmp_path / "coco", tmp_path / "runs"
    (coco / "annotations").mkdir(parents=True)
    both = {"reads": [("--data.root", str(coco))], "writes": [("--run.storage", str(runs))]}
    shared_paths.refuse_unshared(**both)
    assert asked == []
    assert not runs.exists()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for name, flag in (("reads", "--data.root"), ("writes", "--run.storage")):
        with pytest.raises(ConfigError, match=rf"^{flag}: {dict(both[name])[flag]} is a folder .* node w1"):
            shared_paths.refuse_unshared(**{name: both[name]})
    assert asked[0] == [str(coco / "annotations")]
    with pytest.raises(ConfigError, match=r"^--data\.root: "):
        shared_paths.refuse_unshared([("--data.root", f"file://{coco}")])
    assert list(runs.iterdir()) == []
    shared_paths.refuse_unshared(
        [("COCO", "s3://b/coco"), ("--model.init", None)], [("--run.storage", "s3://b/r")]
    )
    assert asked[-1] == []


def nodes_without(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster whose nodes have room and all files but those at a place; no Ray is started."""
    from pipelines import deploy, sweep
    from pipelines.cluster import shared_paths

    def missing(files: list[str]) -> list[tuple[str, list[str]]]:
        there = [file for file in files if Path(file).is_relative_to(place)]
        return [("w1 (10.0.0.2)", there)] if there else []

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(shared_paths, "_missing_on_nodes", missing)
    for verb in (deploy, sweep):
        monkeypatch.setattr(verb, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(sweep, "require", lambda *_: None)


@pytest.mark.parametrize(("place", "flag"), [("shards", "--data.shards"), ("runs", "--run.storage")])
def test_a_sweep_is_refused_before_mlflow_hears_of_it(
    place: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_feed import dotted_shards
    from test_train import small_config

    from hrnet_core.errors import ConfigError
    from pipelines import sweep

    def opened(*_: Any) -> Any:
        raise AssertionError("MLflow was asked")

    monkeypatch.setattr(sweep.Parent, "open", opened)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    manifest = dotted_shards(tmp_path / "shards", {"train2017": 9, "val2017": 4})
    config = small_config(manifest, tmp_path / "runs", epochs=1)
    space = {"space": {"train.lr": {"uniform": [0.1, 0.2]}}, "trials": 2}
    nodes_without(tmp_path / place, monkeypatch)
    with pytest.raises(ConfigError, match=rf"^{flag}: {tmp_path}.* node w1 \(10\.0\.0\.2\) has not got"):
        sweep.sweep(type(config)(**config.model_dump() | {"sweep": space}))


@pytest.mark.parametrize(
    ("place", "flag"),
    [
        ("runs", "--run.storage"),
        ("tiny", "CHECKPOINT"),
        ("keys", "--serve.keys"),
        ("samples", "--serve.samples"),
    ],
)
def test_a_deploy_is_refused_before_serve_is_told(
    place: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that replicas read lies here; the nodes have not got one of it. CHECKPOINT: of a relative storage,
    beside which they read the folder itself."""
    from PIL import Image
    from test_deploy import save

    from hrnet_core.errors import ConfigError
    from pipelines import deploy
    from pipelines.settings.config import RunSettings, ServeSettings

    def told(*_: Any) -> Any:
        raise AssertionError("Serve was told")

    monkeypatch.setattr(deploy.live, "bring_up", told)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("camera-1 0123456789abcdef\n")
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "samples" / "a.png")
    (tmp_path / "samples" / "boxes.json").write_text('{"a.png": [[1, 1, 20, 20]]}')
    settings = ServeSettings(keys=str(tmp_path / "keys"), samples=str(tmp_path / "samples"))
    run = RunSettings(storage="runs" if flag == "CHECKPOINT" else str(tmp_path / "runs"))
    nodes_without(tmp_path / place, monkeypatch)
    with pytest.raises(ConfigError, match=rf"^{flag}: {tmp_path}.* node w1 \(10\.0\.0\.2\) has not got"):
        deploy.deploy(str(save(tmp_path / "tiny", 0)), settings, run=run)


# --- what the reader has to do ---------------------------------------------------------------


def test_what_is_to_fill_in_is_marked(written: dict[str, Any]) -> None:
    text = FILE.read_text()
    body = [line for line in text.splitlines() if "FILL-IN" in line and not line.startswith("#")]
    assert len(body) == 4  # image, region, zone, filesystem
    images = {t["node_config"]["ImageId"] for t in written["available_node_types"].values()}
    assert images == {"ami-FILL-IN"}


def test_cpu_workers_are_spot_machines_and_all_go_when_idle(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    market = {name: t["node_config"].get("InstanceMarketOptions") for name, t in types.items()}
    assert market == {"head": None, "cpu": {"MarketType": "spot"}, "gpu": None}
    assert cluster["idle_timeout_minutes"] == 10
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_the_same_file_with_the_image(written: dict[str, Any]) -> None:
    """As infra/README.md says it, for Ray's validator."""
    (said,) = re.findall(r"^docker: (\{.*\})$", (ROOT / "infra" / "README.md").read_text(), re.MULTILINE)
    docker = yaml.safe_load(said)
    token = {"~/.ray/auth_token": "~/.ray/auth_token"}
    chmod, *_ = written["setup_commands"]
    config = prepared(written | {"docker": docker, "file_mounts": token, "setup_commands": [chmod]})
    assert config["docker"]["image"].endswith("/hrnet-ray:0.1.0")
    with pytest.raises(Exception, match="containr"):
        prepared(written | {"docker": {"containr_name": "hrnet"}})


def test_the_same_file_on_your_own_machines(written: dict[str, Any]) -> None:
    """The differences that its first comment names are all that Ray asks for."""
    cloud_only = ("available_node_types", "head_node_type", "metadata")
    local = {key: value for key, value in written.items() if key not in cloud_only}
    local["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    config = prepared(local)
    assert config["max_workers"] == 2
    assert ray_start(config["head_start_ray_commands"])[1]["num_cpus"] == 0
    labelled = [
        f"{c} --labels=hrnet-pool=gpu" if "ray start" in c else c for c in config["worker_start_ray_commands"]
    ]
    assert ray_start(labelled)[1]["labels"] == "hrnet-pool=gpu"
