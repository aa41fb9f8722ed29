"""What is live on Serve: switched under load, taken back where it fails, brought back after a crash."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from free_ports import free_ports
from test_detector import picture as red_picture
from test_detector import rtdetr_like
from test_serve import save_tiny
from triton_grpc import ask_grpc

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ConfigError
from hrnet_core.images import encode_png
from hrnet_core.predictor import PosePredictor
from pipelines.deploy import deploy
from pipelines.serving import live
from pipelines.settings.config import RaySettings, RunSettings, ServeSettings
from serve import client
from serve.settings import ServeArgs

pytestmark = pytest.mark.ray
IMAGE = np.random.default_rng(0).integers(0, 256, (120, 90, 3), np.uint8)
BOX = [[5.0, 5.0, 60.0, 100.0]]


class Endpoint:
    """A deployment on the shared Ray, as `hrnet deploy` makes it, and the two versions it is given."""

    def __init__(self, folder: Path, port: int, grpc_port: int) -> None:
        self.run = RunSettings(storage=str(folder / "runs"))
        self.settings = ServeSettings(
            port=port, grpc_port=grpc_port, cpus_per_replica=0.5, flip_test=False, max_body_bytes=6_000_000
        )
        self.folders = [save_tiny(folder / str(seed), seed) for seed in (0, 1)]
        predictors = [PosePredictor.load(one, device="cpu") for one in self.folders]
        self.sha256 = [one.spec.weights_sha256 or "" for one in predictors]
        self.poses = {
            one.spec.weights_sha256: one(IMAGE, BOX, flip_test=False)[0].keypoints.xy for one in predictors
        }
        self.port, self.grpc = port, f"127.0.0.1:{grpc_port}"
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, version: int, **settings: Any) -> str:
        changed = self.settings.model_copy(update=settings)
        return deploy(str(self.folders[version]), changed, run=self.run, block=False)

    def roll_back(self) -> str:
        return deploy(None, self.settings, run=self.run, rollback=True, block=False)

    def models(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/v1/models", timeout=60, trust_env=False).json()

    def ask(self, http: Any = httpx) -> httpx.Response:
        """On a connection of its own, or of a client that keeps one."""
        files, data = {"image": encode_png(IMAGE)}, {"boxes": json.dumps(BOX)}
        return http.post(f"{self.url}/v1/poses", files=files, data=data, timeout=60)

    def check(self, answer: dict[str, Any]) -> str:
        """The sha256 that an answer names, once its keypoints have been found to be of that model."""
        sha256 = answer["model"]["sha256"]
        assert answer["model"]["version"] == sha256[:12]
        (person,) = answer["results"][0]["persons"]
        found = np.array(person["keypoints"])[:, :2]
        np.testing.assert_allclose(found, self.poses[sha256][0], rtol=0, atol=1e-3)
        return sha256


@pytest.fixture(scope="module")
def endpoint(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from ray import serve

    endpoint = Endpoint(tmp_path_factory.mktemp("live"), *free_ports(2))
    try:
        endpoint.deploy(0)
        yield endpoint
    finally:
        serve.shutdown()


def under_load(endpoint: Endpoint, change: Callable[[], Any]) -> list[httpx.Response]:
    """What clients are answered while something changes, in the order in which they asked. At least one asked
    before it and one after."""
    asked: list[tuple[float, httpx.Response]] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(trust_env=False) as http:
            while not over.is_set():
                started = time.monotonic()
                asked.append((started, endpoint.ask(http)))

    askers = [threading.Thread(target=ask) for _ in range(2)]

    def wait_for_one(since: float) -> None:
        while not any(started > since for started, _ in asked):
            assert all(asker.is_alive() for asker in askers)
            time.sleep(0.01)

    for asker in askers:
        asker.start()
    try:
        wait_for_one(0)
        change()
        wait_for_one(time.monotonic())
    finally:
        over.set()
        for asker in askers:
            asker.join()
    return [response for _, response in sorted(asked, key=lambda one: one[0])]


def replica_ids() -> list[str]:
    return [state["replica"] for state in live.states()]


def kill_replica() -> None:
    """The only one, as a crash would end it; returns once it is gone."""
    import ray

    (replica,) = replica_ids()
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{live.APP}#poses#{replica}", namespace="serve"))
    deadline = time.monotonic() + 20
    while replica in replica_ids():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_grpc(endpoint: Endpoint) -> None:
    """Answers over gRPC, also to messages longer than gRPC's usual 4 MiB, up to `max_body_bytes`."""
    png = encode_png(IMAGE)
    for picture in (png, png + bytes(5_000_000)):  # what follows a PNG's end is not looked at
        found = ask_grpc(endpoint.grpc, picture, BOX)
        (sha256,) = (one for one in endpoint.sha256 if one.startswith(found.get_response().model_version))
        keypoints = found.as_numpy("keypoints")[0, :, :2]
        np.testing.assert_allclose(keypoints, endpoint.poses[sha256][0], rtol=0, atol=1e-3)
    with pytest.raises(Exception, match=r"RESOURCE_EXHAUSTED.*larger than max"):
        ask_grpc(endpoint.grpc, png + bytes(6_000_000), BOX)


def test_grpc_is_answered_through_haproxy(endpoint: Endpoint) -> None:
    check_grpc(endpoint)


def test_another_version_comes_live_in_place_and_goes_back_without_a_lost_request(endpoint: Endpoint) -> None:
    before = replica_ids()
    for change, version in ((lambda: endpoint.deploy(1), 1), (endpoint.roll_back, 0)):
        responses = under_load(endpoint, change)
        assert [response.text for response in responses if response.status_code != 200] == []
        named = [endpoint.check(response.json()) for response in responses]
        assert set(named) == set(endpoint.sha256), "both answered, each in its own name"
        assert named[-1] == endpoint.sha256[version]
        said = endpoint.models()
        assert said["models"][0]["sha256"] == said["intended"]["sha256"] == endpoint.sha256[version]
        assert said["previous"]["sha256"] == endpoint.sha256[1 - version]
        assert said["last_load_error"] is None
    assert replica_ids() == before


def test_a_detector_comes_and_goes_in_place_and_is_taken_back_where_it_fails(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    """The patch of test_detector is found, or the whole picture is one person; boxes count all the while."""
    endpoint.deploy(0)
    before, model, data = replica_ids(), rtdetr_like(tmp_path), encode_png(red_picture())
    sha256 = PersonDetector.load(model).sha256

    def found() -> tuple[str, Any]:
        answer = client.poses(endpoint.url, data)
        return answer["results"][0]["boxes_source"], answer["model"]["detector"]

    assert found() == ("whole_image", None)
    responses = under_load(endpoint, lambda: endpoint.deploy(0, detector=str(model)))
    assert {endpoint.check(response.json()) for response in responses} == {endpoint.sha256[0]}
    named = {"name": "rtdetr.onnx", "sha256": sha256}
    assert found() == ("detector", named)
    said = endpoint.models()
    assert (said["intended"]["detector"], said["previous"]["detector"]) == (named, None)
    good = live.intended()
    assert good
    assert good.person_detector
    gone = good.person_detector.model_copy(update={"model": str(tmp_path / "gone.onnx"), "sha256": "f" * 64})
    with pytest.raises(ConfigError, match=r"gone\.onnx.*answers as before"):
        live.bring_up(good.model_copy(update={"person_detector": gone}), endpoint.settings, RaySettings())
    assert found() == ("detector", named)
    endpoint.roll_back()
    assert found() == ("whole_image", None)
    endpoint.roll_back()
    assert found() == ("detector", named)
    assert replica_ids() == before


def test_a_version_that_fails_in_the_replica_is_taken_back_for_good(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.deploy(0)
    good = live.intended()
    assert good
    bad = good.model_copy(update={"checkpoint": str(tmp_path / "gone"), "version": "bad", "sha256": "f" * 64})
    with pytest.raises(ConfigError, match=r"gone.*answers as before, and is what Serve starts again") as told:
        live.bring_up(bad, endpoint.settings, RaySettings())
    assert good.version in str(told.value)
    said = endpoint.models()
    assert said["models"][0]["version"] == said["intended"]["version"] == good.version
    assert "bad" in said["last_load_error"]

    # What Serve starts after a crash is what worked, whatever has become of the folder it came from.
    (old,) = replica_ids()
    save_tiny(endpoint.folders[0], seed=7)
    kill_replica()
    answer = client.poses(endpoint.url, encode_png(IMAGE), BOX, attempts=10)
    assert endpoint.check(answer) == good.sha256
    assert replica_ids() != [old]
    deadline = time.monotonic() + 20  # a replica that starts while something changes is told of it later
    while "bad" not in (endpoint.models()["last_load_error"] or "") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "bad" in (endpoint.models()["last_load_error"] or ""), live.states()


@pytest.mark.slow
def test_settings_that_no_replica_starts_with_are_taken_back(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.deploy(1)
    good, before = live.intended(), replica_ids()
    assert good
    bad = good.model_copy(update={"samples": str(tmp_path / "no-samples")})
    with pytest.raises(ConfigError, match=r"no-samples.*answers as before"):
        live.bring_up(bad, endpoint.settings, RaySettings())
    assert replica_ids() == before
    assert "no-samples" in endpoint.models()["last_load_error"]
    wider = endpoint.settings.model_copy(update={"max_people": 7})
    responses = under_load(
        endpoint, lambda: deploy(str(endpoint.folders[1]), wider, run=endpoint.run, block=False)
    )
    assert {response.status_code for response in responses} == {200}
    assert replica_ids() != before
    assert endpoint.models()["last_load_error"] is None


@pytest.mark.slow
def test_a_killed_proxy_comes_back(endpoint: Endpoint) -> None:
    cut = [p for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "haproxy"]
    ours = [p for p in cut if any("hrnet-haproxy-" in argument for argument in p.info["cmdline"] or ())]
    listening = [p for p in ours if endpoint.port in {c.laddr.port for c in p.net_connections("tcp")}]
    assert listening
    for process in listening:
        process.kill()
    answer = client.poses(endpoint.url, encode_png(IMAGE), BOX, attempts=90)  # some seconds apart
    assert endpoint.check(answer) in endpoint.sha256


def test_the_end_waits_for_requests_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ServeArgs(checkpoint="somewhere", version="1", deadline_s=20)
    told: list[ServeArgs] = []
    left = [2, 1, 0]
    monkeypatch.setattr(live, "intended", lambda: args)
    monkeypatch.setattr(live, "_run", told.append)
    monkeypatch.setattr(live, "states", lambda: [{"in_progress": 0}, {"in_progress": left.pop(0)}])
    live.drain()
    assert [one.draining for one in told] == [True]
    assert left == []


def test_two_deploys_at_once_do_not_undo_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to come finds that another one has named a third version, and leaves that alone."""
    before, mine, theirs = (ServeArgs(checkpoint="somewhere", version=v) for v in "123")
    ran: list[str] = []
    said = [
        {"intended": theirs.model_dump(mode="json"), "settled": True, "serving": None, "load_error": None}
    ]
    monkeypatch.setattr(live, "_run", lambda args: ran.append(args.version))
    monkeypatch.setattr(live, "states", lambda: said)
    with pytest.raises(live.Overtaken, match="another deploy"):
        live._change(mine, before)
    assert ran == ["2"]


def test_there_is_nothing_to_go_back_to_at_first() -> None:
    args = ServeArgs(checkpoint="somewhere", name="hrnet-pose", version="1")
    with pytest.raises(ConfigError, match=r"first version.*models:/hrnet-pose/NUMBER"):
        live.back(args)
