"""hrnet deploy: what it refuses before anything starts, what it hands to Serve, and how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from free_ports import free_port
from listening import beyond_loopback
from PIL import Image
from test_detector import rtdetr_like

import pipelines.deploy as deploying
from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from hrnet_core.skeleton import COCO17
from pipelines.cluster.session import with_metrics_port
from pipelines.deploy import deploy, serve_args
from pipelines.process.stop import Stopped
from pipelines.serving import ingress, live
from pipelines.serving.pinned import KEPT, prune, published
from pipelines.serving.running import Endpoint, announced, endpoint_at
from pipelines.serving.samples import samples_from_coco
from pipelines.settings.config import RaySettings, RunSettings, ServeSettings, TrackSettings
from pipelines.storage.files import base_name, join, list_files, read_file
from pipelines.tracking.checkpoints import LocalCheckpoint, local_checkpoint
from serve.settings import Limits, ModelChoice, ServeArgs


def save(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = HRNetConfig(width=4, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1)
    save_checkpoint(
        folder, HRNet(config), CheckpointSpec(config, HeatmapCodec("official", (64, 96), sigma=1.0))
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("deploy") / "tiny", 0)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> Any:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(deploying, "ray_session", started)


def args_of(checkpoint: str, tmp_path: Path, **settings: Any) -> Any:
    run, track = RunSettings(storage=str(tmp_path / "runs")), TrackSettings(registered_model="other")
    with local_checkpoint(checkpoint, track, run.storage) as found:
        return serve_args(found, ServeSettings(**settings), run, track)[0]


@pytest.mark.parametrize(
    ("settings", "block", "cpus", "threads"),
    [
        # Ray counts half of what is used: another set of replicas fits beside these while they are replaced.
        ({}, True, 3.0, 6),
        ({"replicas": 2}, True, 1.5, 3),
        ({"replicas": 2, "threads": 1}, True, 1.5, 1),
        ({"max_replicas": 4}, True, 0.5, 1),
        ({"max_replicas": 9}, True, 0.5, 1),
        ({"cpus_per_replica": 0.5}, True, 0.5, None),
        ({}, False, 1.0, None),  # a Ray that is there already, or a cluster
    ],
)
def test_replicas_share_the_machine_unless_it_is_said_otherwise(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    block: bool,
    cpus: float,
    threads: int | None,
) -> None:
    started: list[ServeArgs] = []
    monkeypatch.setattr(deploying, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(deploying, "ray_address", lambda: "somewhere")
    monkeypatch.setattr(deploying, "metrics_port", lambda: 9464)  # it would start a Ray
    monkeypatch.setattr(deploying, "serve_logs", lambda: "/logs/serve")
    monkeypatch.setattr(deploying, "room_for", lambda *_: 6)
    monkeypatch.setattr(live, "bring_up", lambda args, *_: started.append(args) or "http://here")
    monkeypatch.setattr(live, "intended", lambda: None)
    monkeypatch.setattr(deploying, "_wait_for_signal", lambda: None)
    monkeypatch.setattr(live, "drain", lambda: None)
    monkeypatch.setattr(live, "end_proxies", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = RunSettings(storage=str(tmp_path))
    serve = ServeSettings(port=free_port(), **settings)
    assert deploy(str(checkpoint), serve, run=run, block=block) == "http://here"
    assert [(args.num_cpus, args.threads) for args in started] == [(cpus, threads)]


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
    serve = ServeSettings(port=free_port(), **settings)
    with pytest.raises(error, match=named):
        deploy(str(folder), serve, run=RunSettings(storage=str(tmp_path)))


def test_ctrl_c_before_the_endpoint_is_up_ends_it_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(deploying, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(live, "bring_up", interrupted)
    settings = ServeSettings(cpus_per_replica=1, port=free_port())
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
        deploy(str(checkpoint), settings, run=RunSettings(storage=str(tmp_path)))
    assert stopped.value.exit_code == 143


@pytest.mark.parametrize("ray_is_whole", [True, False])
def test_the_end_does_not_wait_for_a_ray_that_ends_too(
    ray_is_whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A supervisor may send its signal to every process; Ray's own calls then wait for a minute."""
    never = threading.Event()

    def drain() -> None:
        if ray_is_whole:
            raise RuntimeError("no route to the controller\nand so on")
        never.wait()

    monkeypatch.setattr(live, "drain", drain)
    monkeypatch.setattr(deploying, "ray_is_whole", lambda: ray_is_whole)
    deploying._drain(by_haproxy=True)
    never.set()
    why = "RuntimeError: no route to the controller" if ray_is_whole else "Ray ended first"
    assert capsys.readouterr().out == f"not waited for requests in progress ({why})\n"


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        port = free_port()  # not one that another process may be given when it is free again
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConfigError, match=rf"port {port} .*--serve.port"):
            ingress.refuse_port_in_use("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"port {port}"):
            deploy("no-such-checkpoint", ServeSettings(port=port))
    ingress.refuse_port_in_use("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--serve\.host"):
        ingress.refuse_port_in_use("192.0.2.1", port)


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
        "score_threshold": 0.53,
        "max_found": 59,
        "max_batch_pictures": 61,
        "key_rate": 43.0,
        "key_share": 0.47,
        "hosts": ("poses.example.com",),
        "cors_origins": ("https://example.com",),
        "max_bytes_held": 37,
        "max_pixels_held": 41,
        "body_idle_s": 3.0,
        "body_s": 5.0,
        "log_format": "json",
        "traces": "http://127.0.0.1:4318",
        "max_body_bytes": 19,
        "max_pixels": 23,
        "max_people": 29,
        "max_images": 31,
        "first_frame": True,
    }
    renamed = {"replicas": 2, "cpus_per_replica": 0.5, "use_gpu": True, "batch_wait_ms": 7.0}
    kept_here = {"host", "port", "grpc_port", "haproxy", "samples", "keys", "anyone", "detector"}
    assert set(ServeSettings.model_fields) == {*same, *renamed, *kept_here}, "a new setting must go somewhere"
    args = args_of(str(checkpoint), tmp_path, **same, **renamed)
    served = {**args.model_dump(), **args.limits.model_dump()}
    assert {name: served[name] for name in same} == same
    assert args.expected_scores == (), "of a checkpoint that was never evaluated"
    assert (args.num_replicas, args.num_cpus, args.num_gpus, args.batch_wait_s) == (2, 0.5, 1.0, 0.007)
    assert re.fullmatch("[0-9a-f]{12}", args.version)
    assert args.sha256.startswith(args.version)


def test_a_registered_model_keeps_its_version_and_its_name(checkpoint: Path, tmp_path: Path) -> None:
    def served(**where: Any) -> ServeArgs:
        found = LocalCheckpoint("models:/mine@candidate", checkpoint, "mine/12", **where)
        run, track = RunSettings(storage=str(tmp_path / "runs")), TrackSettings(registered_model="other")
        return serve_args(found, ServeSettings(), run, track)[0]

    args = served()
    assert (args.name, args.version, args.source) == ("mine", "12", "models:/mine@candidate")
    # What was downloaded goes with this process, and other nodes do not see it.
    assert served(copied=True).checkpoint == args.checkpoint
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"taken/a: .*--run\.storage"):
        published(checkpoint, str(tmp_path / "taken" / "a"))


def contents(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_what_is_deployed_is_a_copy_that_nothing_changes(checkpoint: Path, tmp_path: Path) -> None:
    """Also where a training run writes its next best weights into the folder, or exports are added."""
    best = tmp_path / "best"
    shutil.copytree(checkpoint, best)
    (best / "trainer.pt").write_bytes(b"not needed to serve")
    first = args_of(str(best), tmp_path)
    assert first.checkpoint != str(best)
    assert contents(first.checkpoint) == contents(checkpoint)
    save(best, seed=1)
    second = args_of(str(best), tmp_path)
    assert second.sha256 != first.sha256
    assert contents(first.checkpoint) == contents(checkpoint)
    assert contents(second.checkpoint) == contents(best)
    described = json.loads((best / "checkpoint.json").read_text())
    (best / "checkpoint.json").write_text(json.dumps({**described, "flip_test": False}))
    third = args_of(str(best), tmp_path)  # the same weights, used in another way
    assert (third.sha256, third.checkpoint != second.checkpoint) == (second.sha256, True)
    assert args_of(str(best), tmp_path).checkpoint == third.checkpoint
    by_uri = args_of(checkpoint.as_uri(), tmp_path)
    assert (by_uri.checkpoint, by_uri.source) == (first.checkpoint, checkpoint.as_uri())


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a machine and of a bucket, where a URI may end in a query."""
    if request.param == "folder":
        return str(tmp_path / "runs")
    return request.getfixturevalue("bucket") + "/runs?scheme=http"


def test_old_copies_go_once_another_is_live(checkpoint: Path, tmp_path: Path, storage: str) -> None:
    """Never those that a replica may start from, the last few, and those of another endpoint."""
    run, best = RunSettings(storage=storage), tmp_path / "best"
    shutil.copytree(checkpoint, best)
    described = json.loads((best / "checkpoint.json").read_text())

    def deployed(number: int, port: int = 8000) -> str:
        provenance = {**described["provenance"], "run_id": str(number)}
        (best / "checkpoint.json").write_text(json.dumps({**described, "provenance": provenance}))
        with local_checkpoint(str(best), TrackSettings(), storage) as found:
            return serve_args(found, ServeSettings(port=port), run, TrackSettings())[0].checkpoint

    def there() -> set[int]:
        return {number for number, copy in enumerate(copies) if list_files(copy)}

    copies = [deployed(number) for number in range(KEPT + 4)]
    assert len(set(copies)) == KEPT + 4
    last = copies[-1]
    assert deployed(0, port=8001) == copies[0], "another endpoint's"
    whole = {name: read_file(join(last, name)) for name in list_files(last)}
    assert whole == {**contents(best), "checkpoint.json": whole["checkpoint.json"]}
    assert prune("runs/w32/best", storage, 8000, {last}) == []
    assert there() == set(range(KEPT + 4))
    assert set(prune(last, storage, 8000, {last, copies[2]})) == {base_name(copies[1]), base_name(copies[3])}
    assert there() == {0, 2, *range(4, KEPT + 4)}
    assert {name: read_file(join(last, name)) for name in list_files(last)} == whole
    assert prune(last, storage, 8000, {last, copies[2]}) == []
    # The first one is nobody's business here any more, and goes with the other endpoint's own list.
    later = [deployed(number, port=8001) for number in range(KEPT - 1, 2 * KEPT)]
    prune(later[-1], storage, 8001, {later[-1]})
    assert not list_files(copies[0])


def test_on_a_cluster_without_a_shared_storage_nodes_read_the_checkpoint_from_where_it_lies(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.chdir(tmp_path)
    track = TrackSettings()
    for name in (str(checkpoint), checkpoint.as_uri()):
        with local_checkpoint(name, track, "runs") as found:
            assert serve_args(found, ServeSettings(), RunSettings(), track)[0].checkpoint == name
    assert not (tmp_path / "runs").exists()
    assert args_of(str(checkpoint), tmp_path).checkpoint.startswith(str(tmp_path / "runs" / "deployed"))


def test_names_of_haproxys_sockets_are_not_too_long_whatever_tmpdir_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """HAProxy takes 97 characters; Serve puts a folder named by its node's id, of 56, before the file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    variables = ingress._of_this_machine(set())
    for name in ("SOCKET_PATH", "METRICS_SOCKET_PATH"):
        assert len(variables[f"RAY_SERVE_HAPROXY_{name}"]) + 1 + 56 <= 97
    ingress.remove_folder(variables)


def test_haproxy_takes_the_requests_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ingress.haproxy(ServeSettings()) is True
    assert ingress.haproxy(ServeSettings(haproxy=False)) is False
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ingress.haproxy(ServeSettings(host="0.0.0.0")) is True
    assert ingress.haproxy(ServeSettings(host="0.0.0.0", haproxy=False)) is False
    # Behind HAProxy replicas listen on `host`: on a loopback address other nodes would not reach them.
    assert ingress.haproxy(ServeSettings()) is False
    with pytest.raises(ConfigError, match=r"--serve.host 0\.0\.0\.0"):
        ingress.haproxy(ServeSettings(haproxy=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert ingress.haproxy(ServeSettings(host="0.0.0.0")) is False
    with pytest.raises(ConfigError, match=r"ray\[serve\]"):
        ingress.haproxy(ServeSettings(haproxy=True))


def test_two_endpoints_of_a_machine_share_no_file_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (ingress.environment(ServeSettings()) for _ in range(2))
    try:
        own = [name for name in one if name.startswith("RAY_SERVE_HAPROXY")]
        own = [name for name in own if "PATH" in name or "FILE" in name or name.endswith(("_PORT", "_BASE"))]
        assert len(own) == 8
        assert all(one[name] != two[name] for name in own)
        folder = Path(one["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        for variables in (one, two):
            ingress.remove_folder(variables)
    assert not folder.exists()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # nodes have their own
    assert not [name for name in ingress.environment(ServeSettings(host="0.0.0.0")) if name in own]


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


def test_samples_of_several_categories(tmp_path: Path) -> None:
    pictures = coco_with(tmp_path / "coco", [1] * 2)
    file = tmp_path / "coco/annotations/person_keypoints_val2017.json"
    content = json.loads(file.read_text())
    content["categories"] = [{**content["categories"][0], "id": n, "name": f"animal {n}"} for n in (1, 2)]
    content["annotations"][0]["category_id"] = 2
    file.write_text(json.dumps(content))
    samples_from_coco(pictures, COCO17, 10**8, tmp_path)
    assert list(json.loads((tmp_path / "boxes.json").read_text())) == ["1.jpg", "2.jpg"]


class Verb:
    """`hrnet deploy` in a process of its own, on a port of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.port = free_port()
        self.more = ["--serve.port", str(self.port), "--run.storage", str(folder), *more]
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        self.environment = {**kept, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(folder)}
        self.lines: list[str] = []

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pipelines.cli", "deploy", *arguments, *self.more]

    def again(self, *arguments: str) -> str:
        """What another process says that changes what is live."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, env=self.environment, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def served(self, checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            self.command(str(checkpoint), "--ray.num-cpus", "1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=self.environment,
            # As a shell's background job: SIGINT is ignored unless the program says otherwise.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        told = threading.Event()

        def read() -> None:
            for line in process.stdout or ():
                self.lines.append(line)
                if "Ctrl-C" in line:
                    told.set()
            told.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert told.wait(180), "".join(self.lines)
            assert process.poll() is None, "".join(self.lines)
            yield process
        finally:
            process.kill()
            reader.join(30)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "by_haproxy"), [(signal.SIGINT, "True"), (signal.SIGTERM, "False")])
def test_the_verb_serves_until_it_is_told_to_stop_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, stop: signal.Signals, by_haproxy: str
) -> None:
    """Under requests: another process switches and rolls back; the end is no request's misfortune."""
    verb = Verb(tmp_path, "--serve.haproxy", by_haproxy)
    other = save(tmp_path / "other", seed=5)
    answers: list[tuple[int, str, str]] = []
    over = threading.Event()
    picture = io.BytesIO()
    Image.new("RGB", (40, 60)).save(picture, "PNG")

    def ask() -> None:
        while not over.is_set():
            try:
                url, files = f"http://127.0.0.1:{verb.port}/v1/poses", {"image": picture.getvalue()}
                response = httpx.post(url, files=files, timeout=60, trust_env=False)
            except httpx.TransportError:  # the port is closed
                answers.append((0, "", ""))
                time.sleep(0.05)
                continue
            body = response.json() if "json" in response.headers["content-type"] else {}
            version = body.get("model", {}).get("version", "")
            answers.append((response.status_code, response.headers["content-type"], version))

    with verb.served(checkpoint) as process:
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 3
        # Other machines reach nothing, but for the port of Serve's own calls to the replica, which asks for
        # Ray's token and is on every interface whatever one says.
        _, outside = beyond_loopback(process.pid)
        assert [port.program for port in outside] == ["ray::ServeReplica:hrnet:poses"], outside
        (metrics,) = [line.split()[1] for line in verb.lines if "Prometheus" in line]
        assert "ray_" in httpx.get(metrics, timeout=30, trust_env=False).text
        (logs,) = [line.split()[1] for line in verb.lines if line.startswith("  logs ")]
        assert list(Path(logs).glob("replica_hrnet_poses_*.log"))
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            assert "other" in verb.again(str(other))
            assert "again" in verb.again("--rollback")
            assert {status for status, _, _ in answers} == {200}, "no request is lost while the model changes"
            versions = [version for _, _, version in answers]
            assert len(set(versions)) == 2
            assert versions[0] == versions[-1]
            if stop == signal.SIGTERM:  # as `timeout` does
                os.killpg(process.pid, stop)
            else:
                process.send_signal(stop)
            assert process.wait(60) == 0, "".join(verb.lines)
        finally:
            over.set()
            asking.join(60)
        _, alive = psutil.wait_procs(started, timeout=30)
        assert not alive
    assert verb.lines[0] == "starting Ray ...\n"
    assert not any("Traceback" in line or "INFO" in line for line in verb.lines), "".join(verb.lines)
    assert {(status, kind) for status, kind, _ in answers} <= {
        (200, "application/json"),
        (503, "application/problem+json"),
        (0, ""),
    }
    assert not list(tmp_path.glob("hrnet/serving/*")), "nobody looks for it any more"


def test_a_deploy_that_replaces_what_runs_says_which_settings_are_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that were given before and are not given now, as nobody meant to change them."""
    monkeypatch.setattr(live, "_run", lambda _: None)
    monkeypatch.setattr(live, "_wait_settled", lambda *_: None)
    before = ServeArgs(checkpoint="a", samples="pictures", limits=Limits(max_people=200), num_cpus=2)
    live._change(ServeArgs(checkpoint="b", num_cpus=2), before)
    assert "(changed: samples, max_people)" in capsys.readouterr().out
    live._change(before.model_copy(update={"checkpoint": "b", "code": "0.2.0"}), before)
    assert "(changed: code)" in capsys.readouterr().out


def test_replicas_of_another_version_of_hrnet_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the deploy that is to replace them would end with a traceback, whatever is done."""
    before = ServeArgs(checkpoint="b", previous=ModelChoice(checkpoint="a"), limits=Limits(max_people=200))
    told = before.model_dump(mode="json")
    told |= {"of_tomorrow": 1, "hosts": ["https://poses.example.com", "poses.example.com"]}
    told["limits"]["of_tomorrow"] = 2
    told["previous"]["of_tomorrow"] = 3
    monkeypatch.setattr(live, "states", lambda: [{"intended": told}])
    assert live.intended() == before
    assert live.back(before).checkpoint == "a"


def test_who_forgets_the_port_is_told_which_are_served(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(deploying, "_ray_runs_here", lambda: False)
    monkeypatch.setattr(deploying, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(deploying, "_until_a_signal", lambda *_: "")
    settings, run = ServeSettings(port=free_port(), cpus_per_replica=1), RunSettings(storage=str(tmp_path))
    (tmp_path / "hrnet" / "serving").mkdir(parents=True)
    (tmp_path / "hrnet" / "serving" / f"{platform.node()}-8125.json").write_text("{}")  # of no process
    deploy(str(checkpoint), settings, run=run)
    assert "note" not in capsys.readouterr().out
    with announced(8123, "127.0.0.1:6000", "127.0.0.1", haproxy=True):
        deploy(str(checkpoint), settings, run=run)
        assert "note: you serve 8123 already; this starts another one beside" in capsys.readouterr().out
        with pytest.raises(ConfigError, match=r"port \d+ of this machine \(you serve 8123; --serve\.port"):
            deploy(None, settings, rollback=True)


def test_there_is_nothing_to_roll_back_where_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(deploying, "_ray_runs_here", lambda: False)
    with pytest.raises(ConfigError, match=r"nothing is served on port 8123 .*--serve\.port"):
        deploy(None, ServeSettings(port=8123), rollback=True)
    with pytest.raises(ConfigError, match="takes no CHECKPOINT"):
        deploy("runs/w32/best", ServeSettings(port=8123), rollback=True)


def test_a_port_is_known_as_long_as_its_process_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert endpoint_at(8123) is None
    with announced(8123, "127.0.0.1:6000", "127.0.0.1", haproxy=True, grpc_port=9000):
        found = endpoint_at(8123)
        assert found
        assert (found.address, found.host, found.haproxy, found.pid, found.grpc_port) == (
            "127.0.0.1:6000",
            "127.0.0.1",
            True,
            os.getpid(),
            9000,
        )
        assert endpoint_at(8124) is None
        (file,) = tmp_path.glob("hrnet/serving/*.json")
        assert file.parent.stat().st_mode & 0o077 == 0
        stale = json.loads(file.read_text())
        file.write_text(json.dumps({**stale, "started": stale["started"] - 100}))
        assert endpoint_at(8123) is None, "another process has the id by now"
    assert endpoint_at(8123) is None


def test_the_metrics_port_is_the_one_asked_for_or_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        port = free_port()  # not one that another process may be given when it is free again
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConfigError, match=f"--ray.metrics-port {port}"):
            with_metrics_port(RaySettings(metrics_port=port))
        monkeypatch.setattr("pipelines.cluster.session.METRICS_PORT", port)
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
    assert here.here_only
    with pytest.raises(ConfigError, match=r"--serve\.keys FILE.*--serve\.anyone"):
        args_of(str(checkpoint), tmp_path, host="0.0.0.0")
    keyed = args_of(str(checkpoint), tmp_path, host="0.0.0.0", keys=str(file))
    assert (keyed.keys, keyed.need_keys, keyed.hosts) == (str(file), True, ())
    assert not keyed.here_only
    assert not args_of(str(checkpoint), tmp_path, host="0.0.0.0", anyone=True).need_keys
    with pytest.raises(ConfigError, match="leave one out"):
        args_of(str(checkpoint), tmp_path, keys=str(file), anyone=True)
    monkeypatch.setenv("HRNET_SERVE_KEYS", "camera 0123456789abcdef")
    assert args_of(str(checkpoint), tmp_path, host="0.0.0.0").need_keys
    monkeypatch.setenv("HRNET_SERVE_KEYS", "camera secret")
    with pytest.raises(ConfigError, match="at least 16") as caught:
        args_of(str(checkpoint), tmp_path)
    assert "secret" not in str(caught.value)


def test_an_endpoint_that_listens_to_others_is_not_left_without_keys(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another deploy, as the docs have it: hrnet promote && hrnet deploy."""
    monkeypatch.delenv("HRNET_SERVE_KEYS", raising=False)
    there = Endpoint("somewhere", "0.0.0.0", True, 1, 0.0)
    monkeypatch.setattr(deploying, "endpoint_at", lambda port: there)
    monkeypatch.setattr(deploying, "ray_session", lambda *_, **__: pytest.fail("nothing is told to Serve"))
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is reached from other machines and no keys are given"):
        deploy(str(checkpoint), ServeSettings(), run=RunSettings(storage=str(tmp_path)))


@pytest.mark.parametrize(("there_port", "said"), [(None, "answering HTTP alone"), (9001, "to gRPC on 9001")])
def test_an_endpoint_keeps_its_grpc_port(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    there_port: int | None,
    said: str,
) -> None:
    there = Endpoint("somewhere", "127.0.0.1", True, 1, 0.0, there_port)
    brought: list[ServeSettings] = []
    monkeypatch.setattr(deploying, "endpoint_at", lambda port: there)
    monkeypatch.setattr(deploying, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(deploying, "room_for", lambda *_: 2)
    bring_up = lambda args, settings, _: brought.append(settings) or "http://127.0.0.1:8000"  # noqa: E731
    monkeypatch.setattr(live, "bring_up", bring_up)
    monkeypatch.setattr(deploying, "_remove_old_copies", lambda *_: None)  # asks what is live
    deploy(str(checkpoint), ServeSettings(grpc_port=9000), run=RunSettings(storage=str(tmp_path)))
    assert brought[0].grpc_port == there_port
    told = capsys.readouterr().out
    assert said in told
    assert ("gRPC  127.0.0.1:9001 " in told) == (there_port == 9001)


def test_the_command_that_began_an_endpoint_changes_its_model_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its --ray.metrics-port is taken then: by that endpoint."""
    there = Endpoint("somewhere", "127.0.0.1", True, 1, 0.0, None)
    joined: list[str | None] = []

    def session(*_: Any, address: str | None, workers_shown: bool) -> contextlib.AbstractContextManager[None]:
        joined.append(address)
        return contextlib.nullcontext()

    monkeypatch.setattr(deploying, "endpoint_at", lambda port: there)
    monkeypatch.setattr(deploying, "ray_session", session)
    monkeypatch.setattr(deploying, "room_for", lambda *_: 2)
    monkeypatch.setattr(live, "bring_up", lambda *_: "http://127.0.0.1:8000")
    monkeypatch.setattr(deploying, "_remove_old_copies", lambda *_: None)  # asks what is live
    with socket.create_server(("127.0.0.1", 0)) as taken:
        asked = RaySettings(metrics_port=taken.getsockname()[1])
        deploy(str(checkpoint), ServeSettings(), run=RunSettings(storage=str(tmp_path)), ray_settings=asked)
    assert joined == ["somewhere"]


def test_grpc_takes_messages_as_long_as_bodies_and_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServeSettings(grpc_port=9000, max_body_bytes=1000, haproxy=False)
    variables = ingress.environment(settings)
    assert variables["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] == "1000"
    assert int(variables["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]) > 1000
    first, last = (int(variables[f"RAY_SERVE_DIRECT_INGRESS_{end}_GRPC_PORT"]) for end in ("MIN", "MAX"))
    assert last - first == 99
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # endpoints that are there already: their calls would be answered by this one
            taken = stack.enter_context(
                socket.create_server(("", ingress._free_ports(1, range(26000, 29900), in_a_row=100)[0]))
            )
            port = taken.getsockname()[1]
            found = int(ingress.environment(settings)["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"])
            assert not found <= port < found + 100
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT" not in ingress.environment(settings)
    with pytest.raises(ValueError, match="grpc_port 8000 is the port of HTTP"):
        ServeSettings(grpc_port=8000)


def test_keys_go_only_where_that_is_said() -> None:
    without = ServeArgs(checkpoint="a")
    keyed = without.model_copy(update={"keys": "/etc/keys", "need_keys": True})
    with pytest.raises(ConfigError, match=r"--serve\.keys /etc/keys as before.*--serve\.anyone"):
        live.refuse_taking_keys_off(without, keyed, ServeSettings())
    with pytest.raises(ConfigError, match="HRNET_SERVE_KEYS as before"):
        live.refuse_taking_keys_off(without, keyed.model_copy(update={"keys": None}), ServeSettings())
    live.refuse_taking_keys_off(without, keyed, ServeSettings(anyone=True))
    live.refuse_taking_keys_off(keyed, keyed, ServeSettings())
    live.refuse_taking_keys_off(keyed, without, ServeSettings())


def test_what_is_wrong_with_a_checkpoint_is_told_of_the_folder_that_was_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    (bad / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"^{bad}/model.safetensors: "):
        args_of(str(bad), tmp_path)


# --- the detector -------------------------------------------------------------------------------

YOLOX = '{"layout": "yolox", "input_size": [320, 256]}'


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda model: model.unlink(), r"rtdetr\.onnx: cannot be read \(No such file or directory\)"),
        (lambda model: model.with_suffix(".json").unlink(), r"declared in MODEL\.json beside it"),
        (lambda model: model.write_bytes(b"no model"), "not a model that ONNX Runtime opens"),
        (
            lambda model: model.with_suffix(".json").write_text(YOLOX),
            "layout yolox reads one of",
        ),
    ],
    ids=["no file", "no declaration", "no ONNX", "another kind"],
)
@pytest.mark.usefixtures("no_ray")
def test_a_detector_that_cannot_be_used_is_refused_in_a_sentence_before_anything_is_touched(
    checkpoint: Path, tmp_path: Path, spoil: Any, named: str
) -> None:
    model = rtdetr_like(tmp_path)
    spoil(model)
    settings = ServeSettings(port=free_port(), detector=str(model))
    with pytest.raises(ConfigError, match=named) as told:
        deploy(str(checkpoint), settings, run=RunSettings(storage=str(tmp_path / "runs")))
    assert "\n" not in str(told.value)
    assert "rtdetr" in str(told.value)


@pytest.mark.usefixtures("no_ray")
def test_a_detector_without_onnx_runtime_names_the_extra(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServeSettings(port=free_port(), detector=str(rtdetr_like(tmp_path)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'hrnet-ray\[onnx\]'"):
        deploy(str(checkpoint), settings, run=RunSettings(storage=str(tmp_path / "runs")))


def test_replicas_get_a_copy_of_the_detector_that_nothing_changes(checkpoint: Path, tmp_path: Path) -> None:
    model = rtdetr_like(tmp_path)
    args = args_of(str(checkpoint), tmp_path, detector=str(model))
    files = [model, model.with_suffix(".json")]
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    pinned = args.person_detector
    assert (pinned.name, pinned.source, pinned.sha256) == ("rtdetr.onnx", str(model), sha256)
    copy = Path(pinned.model)
    assert copy.parent == tmp_path / "runs" / "deployed" / sha256[:16]
    assert [file.read_bytes() for file in (copy, copy.with_suffix(".json"))] == [
        file.read_bytes() for file in files
    ]
    declaration = model.with_suffix(".json")
    declaration.write_text(declaration.read_text().replace('"stretch"', '"letterbox"'))
    again = args_of(str(checkpoint), tmp_path, detector=str(model)).person_detector
    assert again.sha256 != sha256, "another declaration is another detector"
    assert Path(again.model).parent != copy.parent
    assert args_of(str(checkpoint), tmp_path).person_detector is None
