"""The head is lost, and Redis has what it knew."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import ADDRESSES, HERE, Cluster
from stages import BOX, DEPLOY

from serve.client import Client

PASSWORD = "correct-horse"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Address of a Redis with a password."""
    flags = ["--bind", HERE, "--port", "6379", "--requirepass", PASSWORD, "--dir", str(tmp_path)]
    server = subprocess.Popen(["redis-server", *flags], stdout=subprocess.DEVNULL)
    try:
        yield f"{HERE}:6379"
    finally:
        server.terminate()
        server.wait(60)


def test_with_redis_workers_and_endpoint_stay(cluster: Cluster, redis: str, picture: bytes) -> None:
    cluster.stop()
    # As KubeRay sets both.
    cluster.start(
        f"--redis-password={PASSWORD}",
        RAY_REDIS_ADDRESS=redis,
        RAY_gcs_rpc_server_reconnect_timeout_s="600",
    )
    job = cluster.submit("deploy-1", DEPLOY)
    assert job.ends() == 0, job.said()
    before = {n["node_id"] for n in cluster.nodes() if not n["is_head_node"]}
    assert len(before) == 2
    with Client(f"http://{ADDRESSES['w1']}:8000", timeout_s=30, attempts=1) as client:
        poses = client.poses(picture, BOX)["results"]
        cluster.machines["head"].kill()
        away = time.monotonic()
        while time.monotonic() < away + 20:
            assert client.poses(picture, BOX)["results"] == poses
        cluster.start_head(f"--redis-password={PASSWORD}")
        came = time.monotonic()
        while time.monotonic() < came + 30:
            assert client.poses(picture, BOX)["results"] == poses
        assert {n["node_id"] for n in cluster.nodes() if not n["is_head_node"]} == before
