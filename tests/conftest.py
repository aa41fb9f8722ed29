"""Fixtures that more than one test file needs."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bucket_server import Bucket

    from hrnet_core.predictor import PosePredictor

collect_ignore = ["cluster"]  # run by make test-cluster
REFERENCE = Path(__file__).parent / "reference"
CRASHES = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[CRASHES] = os.dup(2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A crash of native code is told on the terminal, also after a command that ran in this process has told
    Python to say it elsewhere."""
    faulthandler.enable(item.config.stash[CRASHES])


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n: a file runs in one process, and all files that want `ray_local` in the same one, so that there
    is one Ray. xdist 3.8 has groups for that (--dist loadgroup), which pytest 9.2 does not see."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "ray" if file in on_ray else file

    files = Path(__file__).parent.glob("test_*.py")
    on_ray = {f"tests/{file.name}" for file in files if "ray_local" in file.read_text()}
    return OneRay(config, log)


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Outputs of the published reference code on fixed inputs (tests/reference/README.md)."""
    return json.loads((REFERENCE / "reference_vectors.json").read_text())


@pytest.fixture(scope="session")
def mmpose_cases() -> dict[str, Any]:
    """Cases and expected values of MMPose's own tests (tests/reference/README.md)."""
    return json.loads((REFERENCE / "mmpose_cases.json").read_text())


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real COCO photographs with keypoints: HRNET_REAL_DATA, or a shared/data folder beside the clone."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HRNET_REAL_DATA", beside))
    if not (folder / "coco" / "annotations").is_dir():
        pytest.skip(
            "real photographs are not part of the project: set HRNET_REAL_DATA to a folder with coco/"
        )
    return folder


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray of 2 CPUs for the whole test session."""
    import ray

    # Train's report() waits for the controller's poll: 2 s by default, much too long for small tests.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint for tests of the endpoint; files that want another say so themselves."""
    from test_serve import save_tiny

    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", 0)


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> PosePredictor:
    from hrnet_core.predictor import PosePredictor

    return PosePredictor.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    """An S3 of this machine's own."""
    import bucket_server

    with bucket_server.running() as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """URI of a bucket of the test's own, reached as a user would: by the environment."""
    import bucket_server
    from pyarrow import fs

    from hrnet_core import locations

    for name, value in bucket_server.environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    locations._s3.cache_clear()
    name = f"bucket-{abs(hash(request.node.name)):x}"
    fs.S3FileSystem(endpoint_override=server.address, allow_bucket_creation=True).create_dir(name)
    server.asked.clear()
    yield f"s3://{name}"
    server.faults.clear()
    locations._s3.cache_clear()


@pytest.fixture(params=["s3", "gs", "az"])
def any_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty bucket: on moto, on an emulator of Google's, and where Azurite is installed
    (`npm install -g azurite`) on that."""
    import bucket_server
    from pyarrow import fs

    from hrnet_core import locations

    if request.param == "s3":
        yield request.getfixturevalue("bucket")
        return
    azurite = shutil.which("azurite-blob")
    if request.param == "az" and not azurite:
        pytest.skip("needs Azurite: npm install -g azurite")
    with bucket_server.google() if request.param == "gs" else bucket_server.azure(azurite) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        locations._azure.cache_clear()
        locations._google.cache_clear()
        if request.param == "gs":
            fs.GcsFileSystem(anonymous=True, project_id="test").create_dir("team")
            yield "gs://anonymous@team"
        else:
            locations._azure("").create_dir("team")
            yield "az://team"
        locations._azure.cache_clear()
        locations._google.cache_clear()
