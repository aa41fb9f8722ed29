"""hrnet deploy: what it refuses before anything starts, what it hands to Serve, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import pipelines.deploy as deploying
from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from hrnet_core.skeleton import COCO17
from pipelines.checkpoints import LocalCheckpoint, local_checkpoint
from pipelines.cluster import with_metrics_port
from pipelines.config import RaySettings, RunSettings, ServeSettings, TrackSettings
from pipelines.deploy import deploy, serve_args
from serve.settings import ServeArgs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "tiny"
    config = HRNetConfig(width=4, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1)
    save_checkpoint(
        folder, HRNet(config), CheckpointSpec(config, HeatmapCodec("official", (64, 96), sigma=1.0))
    )
    return folder


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(_: Any) -> Any:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(deploying, "ray_session", started)


def args_of(checkpoint: str, tmp_path: Path, **settings: Any) -> Any:
    run, track = RunSettings(storage=str(tmp_path / "runs")), TrackSettings(registered_model="other")
    with local_checkpoint(checkpoint, track, run.storage) as found:
        return serve_args(found, ServeSettings(**settings), run, track)[0]


@pytest.mark.parametrize(
    ("settings", "block", "cpus"),
    [
        ({}, True, 6.0),
        ({"replicas": 2}, True, 3.0),
        ({"max_replicas": 4}, True, 1.0),
        ({"max_replicas": 9}, True, 1.0),
        ({"cpus_per_replica": 0.5}, True, 0.5),
        ({}, False, 1.0),  # a Ray that is there already, or a cluster
    ],
)
def test_replicas_share_the_machine_unless_it_is_said_otherwise(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    block: bool,
    cpus: float,
) -> None:
    started: list[ServeArgs] = []
    monkeypatch.setattr(deploying, "ray_session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(deploying, "room_for", lambda *_: 6)
    monkeypatch.setattr(deploying, "start", lambda args, *_: started.append(args) or "http://here")
    monkeypatch.setattr(deploying, "_wait_for_signal", lambda: None)
    monkeypatch.setattr("ray.serve.delete", lambda _: None)
    run = RunSettings(storage=str(tmp_path))
    assert deploy(str(checkpoint), ServeSettings(**settings), run=run, block=block) == "http://here"
    assert [args.num_cpus for args in started] == [cpus]


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({}, CheckpointError, "no-such-folder"),
        ({"mode": "onnx", "use_gpu": True}, ConfigError, "'onnx' cannot run here"),
        ({"samples": "no-such-samples"}, ConfigError, "no-such-samples"),
        ({"flip_test": True}, CheckpointError, "self-test|sha256"),
    ],
    ids=["no folder", "mode", "samples", "weights"],
)
@pytest.mark.usefixtures("no_ray")
def test_what_is_wrong_is_said_before_ray_starts(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], named: str
) -> None:
    folder = checkpoint if settings else tmp_path / "no-such-folder"
    if "flip_test" in settings:
        folder = tmp_path / "broken"
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(error, match=named):
        deploy(str(folder), ServeSettings(**settings), run=RunSettings(storage=str(tmp_path)))


def test_ctrl_c_before_the_endpoint_is_up_ends_it_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(deploying, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(deploying, "start", interrupted)
    settings, run = ServeSettings(cpus_per_replica=1), RunSettings(storage=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        deploy(str(checkpoint), settings, run=run)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .*--serve.port"):
            deploying._refuse_port_in_use("127.0.0.1", port)
    deploying._refuse_port_in_use("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--serve\.host"):
        deploying._refuse_port_in_use("192.0.2.1", port)


def test_every_setting_reaches_serve(checkpoint: Path, tmp_path: Path) -> None:
    same = {
        "max_replicas": 5,
        "device": "cuda",
        "mode": "bfloat16",
        "compile_cache": "somewhere",
        "threads": 3,
        "flip_test": False,
        "max_batch_people": 11,
        "max_requests": 13,
        "deadline_s": 17.0,
        "max_bodies": 7,
        "key_rate": 43.0,
        "key_share": 0.47,
        "hosts": ("poses.example.com",),
        "cors_origins": ("https://example.com",),
        "max_bytes_held": 37,
        "max_pixels_held": 41,
        "body_idle_s": 3.0,
        "body_s": 5.0,
        "max_body_bytes": 19,
        "max_pixels": 23,
        "max_people": 29,
        "max_images": 31,
        "first_frame": True,
    }
    renamed = {"replicas": 2, "cpus_per_replica": 0.5, "use_gpu": True, "batch_wait_ms": 7.0}
    kept_here = {"host", "port", "haproxy", "samples", "keys", "anyone"}
    assert set(ServeSettings.model_fields) == {*same, *renamed, *kept_here}, "a new setting must go somewhere"
    args = args_of(str(checkpoint), tmp_path, **same, **renamed)
    served = {**args.model_dump(), **args.limits.model_dump()}
    assert {name: served[name] for name in same} == same
    assert (args.num_replicas, args.num_cpus, args.num_gpus, args.batch_wait_s) == (2, 0.5, 1.0, 0.007)
    assert args.checkpoint == str(checkpoint)
    assert re.fullmatch("[0-9a-f]{12}", args.version)


def test_a_registered_model_keeps_its_version_and_its_name(checkpoint: Path, tmp_path: Path) -> None:
    def served(**where: Any) -> ServeArgs:
        found = LocalCheckpoint("models:/mine@candidate", checkpoint, "mine/12", **where)
        run, track = RunSettings(storage=str(tmp_path / "runs")), TrackSettings(registered_model="other")
        return serve_args(found, ServeSettings(), run, track)[0]

    args = served()
    assert (args.name, args.version, args.source) == ("mine", "12", "models:/mine@candidate")
    assert args.checkpoint == str(checkpoint)

    # What was downloaded goes with this process, and other nodes do not see it.
    copied = Path(served(copied=True).checkpoint)
    assert copied.parent == tmp_path / "runs" / "deployed"
    assert (copied / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert {f.name for f in copied.iterdir()} == {f.name for f in checkpoint.iterdir()}
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"taken/a: .*--run\.storage"):
        deploying._published(checkpoint, str(tmp_path / "taken" / "a"))


def test_a_checkpoint_by_uri_is_checked_here_and_fetched_by_the_replicas(
    checkpoint: Path, tmp_path: Path
) -> None:
    args = args_of(checkpoint.as_uri(), tmp_path)
    assert (args.checkpoint, args.source, args.name) == (checkpoint.as_uri(), checkpoint.as_uri(), "other")


def test_haproxy_is_for_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deploying._serve_environment(ServeSettings()) == {"RAY_SERVE_LOG_TO_STDERR": "0"}
    wanted = deploying._serve_environment(ServeSettings(haproxy=True))
    assert wanted["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert wanted["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "1"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    everywhere = {"host": "0.0.0.0"}
    assert deploying._serve_environment(ServeSettings(**everywhere)) == {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    assert deploying._serve_environment(ServeSettings(**everywhere, haproxy=False)) == {}
    # Behind HAProxy replicas listen on `host`: on a loopback address other nodes would not reach them.
    assert deploying._serve_environment(ServeSettings()) == {}
    with pytest.raises(ConfigError, match=r"--serve.host 0\.0\.0\.0"):
        deploying._serve_environment(ServeSettings(haproxy=True))


def coco_with(root: Path, orientations: list[int]) -> Path:
    """A COCO root of pictures of 100 x 80 px with one well-seen person each."""
    (root / "annotations").mkdir(parents=True)
    pictures = root / "val2017"
    pictures.mkdir()
    images, annotations = [], []
    for i, orientation in enumerate(orientations, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(np.full((80, 100, 3), 10 * i, np.uint8)).save(file, "JPEG", exif=exif)
        (pictures / f"{i}.jpg").write_bytes(file.getvalue())
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80})
        annotations.append(
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "iscrowd": 0,
                "area": 2000.0,
                "bbox": [10, 5, 40, 70],
                "keypoints": [30, 40, 2] * 17,
                "num_keypoints": 17,
            }
        )
    category = {"id": 1, "name": "person", "keypoints": list(COCO17.keypoints), "skeleton": []}
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (root / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    return pictures


def test_a_coco_split_becomes_samples(checkpoint: Path, tmp_path: Path) -> None:
    pictures = coco_with(tmp_path / "coco", [1, 6, 1] + [1] * 10)
    cut = (pictures / "3.jpg").read_bytes()
    (pictures / "3.jpg").write_bytes(cut[: len(cut) // 2])
    args = args_of(str(checkpoint), tmp_path, samples=str(pictures))
    folder = Path(args.samples)
    assert folder == tmp_path / "runs" / "samples", "a replica that starts later finds them too"
    boxes = json.loads((folder / "boxes.json").read_text())
    wanted = ["1.jpg", *(f"{i}.jpg" for i in range(4, 11))]
    assert list(boxes) == wanted, "8 of them, neither the turned one nor the one that is cut off"
    assert {file.name for file in folder.iterdir()} == {*wanted, "boxes.json"}
    assert boxes["1.jpg"] == [[10, 5, 39, 69]]
    assert (folder / "1.jpg").read_bytes() == (pictures / "1.jpg").read_bytes()
    with pytest.raises(ConfigError, match="person_keypoints_other"):
        args_of(str(checkpoint), tmp_path, samples=str(tmp_path / "other"))
    small = args_of(str(checkpoint), tmp_path, samples=str(pictures), max_pixels=7_999)
    assert json.loads((Path(small.samples) / "boxes.json").read_text()) == {}, "none that it would refuse"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_verb_serves_until_it_is_told_to_stop_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    command = [sys.executable, "-m", "pipelines.cli", "deploy", str(checkpoint), "--serve.port", str(port)]
    process = subprocess.Popen(
        [*command, "--ray.num-cpus", "1", "--run.storage", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        # As a shell's background job: SIGINT is ignored unless the program says otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    lines: list[str] = []
    told = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if "Ctrl-C" in line:
                told.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert told.wait(180), "".join(lines)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 3
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert json.load(opener.open(f"http://127.0.0.1:{port}/readyz", timeout=30))["ready"] is True
        (metrics,) = [line.split()[1] for line in lines if "Prometheus" in line]
        assert b"ray_" in opener.open(metrics, timeout=30).read()
        process.send_signal(stop)
        assert process.wait(60) == 0, "".join(lines)
        _, alive = psutil.wait_procs(started, timeout=30)
        assert not alive
    finally:
        process.kill()
        reader.join(30)
    assert not any("Traceback" in line for line in lines), "".join(lines)


def test_the_metrics_port_is_the_one_asked_for_or_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--ray.metrics-port {port}"):
            with_metrics_port(RaySettings(metrics_port=port))
        monkeypatch.setattr("pipelines.cluster.METRICS_PORT", port)
        assert with_metrics_port(RaySettings()).metrics_port is None
    assert with_metrics_port(RaySettings()).metrics_port == port
    assert with_metrics_port(RaySettings(metrics_port=port)).metrics_port == port


def test_other_machines_are_answered_with_keys_or_by_saying_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HRNET_SERVE_KEYS", raising=False)
    file = tmp_path / "keys"
    file.write_text("camera 0123456789abcdef\n")
    here = args_of(str(checkpoint), tmp_path)
    assert (here.keys, here.need_keys, "localhost" in here.hosts) == (None, False, True)
    with pytest.raises(ConfigError, match=r"--serve\.keys FILE.*--serve\.anyone"):
        args_of(str(checkpoint), tmp_path, host="0.0.0.0")
    keyed = args_of(str(checkpoint), tmp_path, host="0.0.0.0", keys=str(file))
    assert (keyed.keys, keyed.need_keys, keyed.hosts) == (str(file), True, ())
    assert not args_of(str(checkpoint), tmp_path, host="0.0.0.0", anyone=True).need_keys
    with pytest.raises(ConfigError, match="leave one out"):
        args_of(str(checkpoint), tmp_path, keys=str(file), anyone=True)
    monkeypatch.setenv("HRNET_SERVE_KEYS", "camera 0123456789abcdef")
    assert args_of(str(checkpoint), tmp_path, host="0.0.0.0").need_keys
    monkeypatch.setenv("HRNET_SERVE_KEYS", "camera secret")
    with pytest.raises(ConfigError, match="at least 16") as caught:
        args_of(str(checkpoint), tmp_path)
    assert "secret" not in str(caught.value)
