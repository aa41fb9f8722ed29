"""A cluster of machines with a bucket and an MLflow server, for all tests of this folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # bucket_server

import bucket_server
from machines import HERE, ROOT, Cluster, network, until
from stages import DRAWN, TWO, losses, preprocess, train

from pipelines.storage.files import list_files, read_file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "HRNET_OWN_NAMESPACES" not in os.environ:
        for item in items:
            item.add_marker(pytest.mark.skip("needs namespaces of its own: make test-cluster"))


@pytest.fixture(scope="session")
def bucket() -> Iterator[bucket_server.Bucket]:
    with network(), bucket_server.running(HERE) as server:
        yield server


@pytest.fixture(scope="session")
def environment(bucket: bucket_server.Bucket) -> dict[str, str]:
    """What a user sets on all machines, and here: the bucket's address and credentials."""
    variables = bucket_server.environment(bucket)
    del variables["PATH"]
    os.environ.update(variables)
    from pyarrow import fs

    fs.S3FileSystem(endpoint_override=bucket.address, allow_bucket_creation=True).create_dir("team")
    return variables


@pytest.fixture(scope="session")
def mlflow(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server with its artifacts in the bucket, by the script that clusters use."""
    folder = tmp_path_factory.mktemp("mlflow")
    own = {"MLFLOW_HOST": HERE, "MLFLOW_PORT": "5000", "MLFLOW_ARTIFACTS": "s3://team/mlflow"}
    own |= {"MLFLOW_S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"]}
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", str(ROOT / "infra" / "mlflow.sh"), str(folder)],
            env={**os.environ, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address = f"http://{HERE}:5000"

    def answers() -> bool:
        assert server.poll() is None, (folder / "server.log").read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
        return False

    try:
        until(answers, 180, "MLflow answers")
        yield address
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="session")
def cluster(
    environment: dict[str, str], mlflow: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    made = Cluster({**environment, "MLFLOW_TRACKING_URI": mlflow}, tmp_path_factory.mktemp("logs"))
    try:
        made.laptop.start()
        made.start()
        yield made
    finally:
        made.stop()
        made.laptop.kill()


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    """What a test breaks and leaves broken costs the next ones nothing."""
    yield
    if not cluster.whole():
        cluster.stop()
        cluster.start()


@pytest.fixture(scope="session")
def alone(cluster: Cluster) -> dict[str, Any]:
    """The stages on the laptop alone: the digest, and the losses of a run that nothing happened to."""
    laptop = cluster.laptop
    laptop.run(f"hrnet draw coco {DRAWN}")
    laptop.run(f"{preprocess('coco', 'shards')} {TWO}")
    laptop.run(f"{train('shards', 'runs', 'r')} {TWO}")
    digest = json.loads(laptop.run("cat shards/manifest.json"))["digest"]
    return {"digest": digest, "losses": losses(laptop.run("cat runs/r/metrics.jsonl"))}


@pytest.fixture(scope="session")
def picture(bucket: bucket_server.Bucket) -> bytes:
    """One of those drawn."""
    return read_file(f"s3://team/coco/val2017/{sorted(list_files('s3://team/coco/val2017'))[0]}")
