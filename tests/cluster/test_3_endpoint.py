"""Two replicas on two machines: one is cut off under load; another version comes and goes."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from machines import ADDRESSES, Cluster, Running, until
from stages import ANOTHER, BOX, DEPLOY
from triton_grpc import ask_grpc

from pipelines.storage.files import read_file
from serve.client import Client, ServerError

ASKERS = 4


@dataclass
class Asked:
    begun: float
    ended: float
    failed: str
    """Why; "" where poses came."""


def ask(address: str, picture: bytes, asked: list[Asked], ended: threading.Event) -> None:
    """One request after the other, none of them sent twice."""
    with Client(f"http://{address}:8000", timeout_s=120, attempts=1) as client:
        while not ended.is_set():
            begun, failed = time.monotonic(), ""
            try:
                answer = client.poses(picture, BOX)
                assert len(answer["results"][0]["persons"]) == 1
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"
            asked.append(Asked(begun, time.monotonic(), failed))


def test_a_replica_is_cut_off_under_load(cluster: Cluster, picture: bytes) -> None:
    job = cluster.submit("deploy", DEPLOY)
    assert job.ends() == 0, job.said()
    asked: list[Asked] = []
    ended = threading.Event()
    arguments = (ADDRESSES["head"], picture, asked, ended)
    askers = [threading.Thread(target=ask, args=arguments) for _ in range(ASKERS)]
    for one in askers:
        one.start()
    time.sleep(10)
    before = list(asked)
    cut = time.monotonic()
    cluster.machines["w2"].cut_off()
    time.sleep(60)
    ended.set()
    for one in askers:
        one.join()
    assert not [one for one in before if one.failed]
    lost = [one for one in asked if one.failed]
    assert len(lost) <= ASKERS, lost
    late = [one for one in asked if one.begun > cut + 30]
    assert late
    assert max(one.ended - one.begun for one in late) < 5
    cluster.machines["w2"].kill()
    cluster.start_worker("w2")


def test_another_version_and_back(cluster: Cluster, picture: bytes) -> None:
    """Asked all the while on both machines; the poses are of one version or of the other."""
    first, second = (weights_of(run) for run in ("stopped", "rates-00"))
    with contextlib.ExitStack() as closed:
        addresses = [f"http://{ADDRESSES[name]}:8000" for name in ("w1", "w2")]
        clients = [closed.enter_context(Client(address, timeout_s=120)) for address in addresses]
        until(lambda: all(answers(client) for client in clients), 300, "both machines answer")
        before = poses_by_all(clients, picture)
        assert versions(clients) == {first}
        answered = asked_while(cluster.submit("deploy-another", ANOTHER), clients, picture)
        assert versions(clients) == {second}
        after = poses_by_all(clients, picture)
        for name in ("w1", "w2"):
            over_grpc = ask_grpc(f"{ADDRESSES[name]}:8001", picture, BOX)
            assert over_grpc.get_response().model_version == second
            found, over_http = over_grpc.as_numpy("keypoints")[0], np.array(after[0]["keypoints"])
            np.testing.assert_allclose(found[:, :2], over_http[:, :2], rtol=0, atol=1e-3)
        assert after != before
        back = cluster.submit("roll-back", "hrnet deploy --rollback")
        answered += asked_while(back, clients, picture)
        assert f"in place of {second}" in back.said(), back.said()
        assert versions(clients) == {first}
        assert poses_by_all(clients, picture) == before
    assert answered.count(before) + answered.count(after) == len(answered)
    assert before in answered


def weights_of(run: str) -> str:
    """As deploy names a version that is not registered: by digits of its sha256."""
    described = json.loads(read_file(f"s3://team/runs/{run}/best/checkpoint.json"))
    return str(described["weights_sha256"][:12])


def answers(client: Client) -> bool:
    with contextlib.suppress(OSError, ServerError):
        return bool(client.models()["models"])
    return False


def versions(clients: list[Client]) -> set[str]:
    """By whichever replica answers, several times."""
    return {model["version"] for client in clients * 4 for model in client.models()["models"]}


def poses_by_all(clients: list[Client], picture: bytes) -> Any:
    """The poses, which are the same on all machines."""
    found = [client.poses(picture, BOX)["results"][0]["persons"] for client in clients * 2]
    assert all(one == found[0] for one in found)
    return found[0]


def asked_while(job: Running, clients: list[Client], picture: bytes) -> list[Any]:
    """Poses that came until the job had ended well."""
    found = []
    while job.process.poll() is None:
        found += [client.poses(picture, BOX)["results"][0]["persons"] for client in clients]
    assert job.ends() == 0, job.said()
    assert found
    return found
