"""Two replicas on two machines, one of which is cut off from the network under load."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from machines import ADDRESSES, Cluster
from stages import BOX, DEPLOY

from serve.client import Client

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
    print(
        len(before),
        [a for a in asked if a.failed],
        sorted((round(a.ended - a.begun, 2), round(a.begun - cut, 2)) for a in asked)[-12:],
    )
    assert not [one for one in before if one.failed]
    lost = [one for one in asked if one.failed]
    assert len(lost) <= ASKERS, lost
    late = [one for one in asked if one.begun > cut + 30]
    assert late
    assert max(one.ended - one.begun for one in late) < 5
    cluster.machines["w2"].kill()
    cluster.start_worker("w2")
