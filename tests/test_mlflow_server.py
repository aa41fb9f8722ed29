"""infra/mlflow.sh as a team runs it: PostgreSQL, artifacts in a bucket, users. The database is a real one."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from free_ports import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PASSWORD = "correct-horse-battery"
NEXT = os.environ.get("HRNET_NEXT_MLFLOW")
"""Folder of the programs of another environment, with a later MLflow: the copy is upgraded to that and served
by it, and asked by the MLflow of this one."""


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of PostgreSQL's socket, with a database and a user called mlflow."""
    folder = tmp_path_factory.mktemp("pg")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_RUNTIME_DIR", str(folder))  # it warns where there is none
        import pgserver

        database = pgserver.get_server(folder / "data", cleanup_mode="stop")
        database.psql("CREATE USER mlflow; CREATE DATABASE mlflow OWNER mlflow;")
        database.psql("CREATE DATABASE copy OWNER mlflow;")
        yield folder / "data"
        database.cleanup()


def address(postgres: Path, database: str = "mlflow") -> str:
    # A % must come through configparser, SQLAlchemy and the shell. (This server asks for no password.)
    return f"postgresql+psycopg2://mlflow:pass%25word@/{database}?host={postgres}"


@pytest.fixture
def environment(postgres: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of the script, and of those who call the server: the bucket's fixture has set AWS's own."""
    port = str(free_port())
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as where the project is installed
        "MLFLOW_PORT": port,
        "MLFLOW_BACKEND_STORE_URI": address(postgres),
        "MLFLOW_ARTIFACTS": f"{bucket}/mlflow",
        "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
    }


def script(environment: dict[str, str], *arguments: str | Path) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "infra/mlflow.sh"), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout


class running:
    """The server for the time of the block, by the script."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder
        self.uri = f"http://127.0.0.1:{environment['MLFLOW_PORT']}"

    def __enter__(self) -> str:
        said = script(self.environment, "--background", self.folder)
        self.process = int(said.partition("process ")[2].partition(",")[0])
        return self.uri

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process, signal.SIGTERM)
        port = int(self.environment["MLFLOW_PORT"])
        while True:
            with socket.socket() as free:
                if free.connect_ex(("127.0.0.1", port)):
                    return


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_runs_in_a_database_artifacts_in_a_bucket_for_users(
    environment: dict[str, str],
    postgres: Path,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From first start over a restart to a copy of the database from which another server goes on."""
    import mlflow
    from pyarrow import fs

    with running(environment, tmp_path / "state") as uri:
        search = f"{uri}/api/2.0/mlflow/experiments/search?max_results=1"
        assert status(f"{uri}/health") == 200
        assert status(search) == 401
        assert status(search, Host="evil.example") == 403
        commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert "mlflow server" in commands
        assert not [secret for secret in (PASSWORD, "pass%25word") if secret in commands]
        client = mlflow.MlflowClient(uri)
        run = client.create_run(client.create_experiment("poses"))
        client.log_metric(run.info.run_id, "val_gt/AP", 0.744)
        (tmp_path / "sent").mkdir()
        (tmp_path / "sent/report.txt").write_text("AP .744")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # through which the server takes artifacts
        client.log_artifact(run.info.run_id, str(tmp_path / "sent/report.txt"))
    inside = fs.FileSelector(f"{bucket.removeprefix('s3://')}/mlflow", recursive=True)
    files = fs.S3FileSystem(endpoint_override=environment["AWS_ENDPOINT_URL"]).get_file_info(inside)
    assert [file.base_name for file in files if file.is_file] == ["report.txt"]

    import pgserver

    programs = Path(pgserver.__file__).parent / "pginstall/bin"
    reached = ["-h", str(postgres), "-U", "postgres"]
    saved = tmp_path / "mlflow.dump"
    subprocess.run([programs / "pg_dump", *reached, "-Fc", "-f", saved, "mlflow"], check=True)
    subprocess.run([programs / "pg_restore", *reached, "-d", "copy", saved], check=True)
    other = environment | {"MLFLOW_BACKEND_STORE_URI": address(postgres, "copy")}
    if NEXT:
        other["PATH"] = f"{NEXT}:{environment['PATH']}"
    assert "the tables fit MLflow" in script(other, "--upgrade", tmp_path / "other")
    with running(other, tmp_path / "other") as uri:
        again = mlflow.MlflowClient(uri).get_run(run.info.run_id)
        assert again.data.metrics == {"val_gt/AP": 0.744}
        got = mlflow.MlflowClient(uri).download_artifacts(run.info.run_id, "report.txt", str(tmp_path))
        assert Path(got).read_text() == "AP .744"


def test_only_its_owner_reads_what_holds_passwords(environment: dict[str, str], tmp_path: Path) -> None:
    """Also where an earlier start had made it for all to read."""
    del environment["MLFLOW_BACKEND_STORE_URI"]
    (tmp_path / "users.db").touch(0o644)
    with running(environment, tmp_path) as uri:
        search = f"{uri}/api/2.0/mlflow/experiments/search?max_results=1"
        admin = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        assert status(search, Authorization=f"Basic {admin}") == 200
        secrets = list(tmp_path.glob("users.*"))
        assert [(file.stat().st_mode & 0o777, file.stat().st_size > 0) for file in secrets] == [
            (0o600, True)
        ] * 2


def test_users_take_a_secret(environment: dict[str, str], tmp_path: Path) -> None:
    del environment["MLFLOW_FLASK_SERVER_SECRET_KEY"]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        script(environment, "--background", tmp_path)
    assert "MLFLOW_FLASK_SERVER_SECRET_KEY: is needed with MLFLOW_AUTH_ADMIN_PASSWORD" in failed.value.stderr
