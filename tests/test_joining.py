"""A RAY_ADDRESS that cannot be joined is told at once and in a sentence, with the way out."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from free_ports import free_port
from ray.exceptions import AuthenticationError
from small_coco import write_coco

from hrnet_core.errors import ConfigError, Failure
from pipelines.cluster.joining import refusals_told, refuse_address
from pipelines.cluster.session import on_cluster, ray_session
from pipelines.settings.config import RaySettings


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", r"is where jobs are submitted, no Ray to join\. .*RAY_API_SERVER_ADDRESS"),
        ("https://ray.example.org", r"ray job submit --address https://ray\.example\.org -- hrnet"),
        ("ray://10.0.0.1:10001", r"a verb does not run over Ray's client\. Submit it as a job"),
        ("head", r"RAY_ADDRESS head: is no HOST:PORT"),
        ("10.0.0.1", r"is no HOST:PORT"),
        ("10.0.0.1:ray", r"is no HOST:PORT"),
        ("nohost.invalid:6379", r"no Ray answers there \(.+\)\. Is its head up"),
        (f"{'a' * 80}:6379", r"no Ray answers there"),
        ("127.0.0.1:99999", r"no Ray answers there"),
    ],
)
def test_an_address_that_is_none(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        refuse_address(address, patience=0)
    assert "Unset RAY_ADDRESS" in str(told.value)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a stage, which asks before Ray does."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr("pipelines.cluster.joining.PATIENCE", 0.0)
    with pytest.raises(ConfigError, match=rf"{address}: no Ray answers there \(Connection refused\)"):
        refuse_address(address, patience=0)
    monkeypatch.setenv("RAY_ADDRESS", f"http://{address}")
    with pytest.raises(ConfigError, match="where jobs are submitted"), ray_session(RaySettings()):
        pytest.fail("joined")


@pytest.mark.parametrize("raylet", [True, False])
def test_the_head_comes_back_meanwhile(raylet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But it is joined from its nodes alone."""
    here = [["/bin/python", "raylet"], [], *[["/ray/raylet", "--node_id=ab"]] * raylet]
    processes = [SimpleNamespace(info={"cmdline": command}) for command in here]
    monkeypatch.setattr("psutil.process_iter", lambda attributes: processes)
    port = free_port()

    def come() -> None:
        with socket.create_server(("127.0.0.1", port)) as server:
            came.append(server.accept())

    came: list[object] = []
    later = threading.Timer(0.5, come)
    later.start()
    with contextlib.ExitStack() as refused:
        if not raylet:
            refused.enter_context(pytest.raises(ConfigError, match="one of its nodes, and this machine is"))
        refuse_address(f"127.0.0.1:{port}", patience=30)
    later.join()
    assert came


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Type: text/plain", "'HTTP/1.1 401"),
        (b"-ERR\r\n", "'-ERR'"),
        (b"\0\0\x18\4\0", None),
        (b"\x15\3\1\0\2", None),
    ],
)
def test_what_answers_is_no_head(answer: bytes, shown: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dashboard, on whose port jobs are submitted, and a Redis, where Ray's heads once listened; but a
    head (gRPC's settings), and one that speaks TLS alone (its alert), are let pass."""
    monkeypatch.setattr("pipelines.cluster.joining._node_here", lambda: True)

    def serve() -> None:
        connection, _ = server.accept()
        connection.sendall(answer)
        connection.recv(100)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        with contextlib.ExitStack() as refused:
            if shown:
                said = rf"what answers there is no Ray's head, but {shown}"
                refused.enter_context(pytest.raises(ConfigError, match=said))
            refuse_address(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert not on_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert on_cluster()


HEAD = "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("address", "refusal", "kind", "said"),
    [
        (
            HEAD,
            AuthenticationError("Token authentication is"),
            ConfigError,
            r"its token, .*~/\.ray/auth_token",
        ),
        (HEAD, ConnectionError("Failed to connect"), ConfigError, r"joined \(Failed.*RAY_AUTH_MODE=token"),
        ("auto", ConnectionError("Could not find any"), ConfigError, "auto: no Ray runs on this machine"),
        (HEAD, RuntimeError("Version mismatch: The\n    Ray: 2.40"), ConfigError, r"others\. The Ray: 2\.40"),
        ("local", Exception("The current node timed out during startup."), Failure, "machine is too busy"),
        (
            "local",
            PermissionError(13, "Permission denied", "/.ray"),
            ConfigError,
            r"\(/\.ray: Perm.*set HOME",
        ),
        (
            "local",
            OSError("AF_UNIX path length cannot"),
            ConfigError,
            "too long.*RAY_TMPDIR to one with a short",
        ),
        ("local", OSError("a fourth"), OSError, "^a fourth$"),
        (HEAD, RuntimeError("another"), RuntimeError, "^another$"),
        ("local", ValueError("a third"), ValueError, "^a third$"),
    ],
)
def test_refusals_of_ray(address: str, refusal: Exception, kind: type[Exception], said: str) -> None:
    """Ray's own words, shortened; the slow test holds that a real head causes the first two, the test
    below that Ray says so of a long path."""
    with pytest.raises(kind, match=said), refusals_told(address):
        raise refusal


def test_a_folder_too_deep_for_rays_sockets(tmp_path: Path) -> None:
    """Asked of Ray itself, which looks at the path before it starts anything."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    code = "from pipelines.cluster.session import *\nwith ray_session(RaySettings()): pass"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(deep)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ConfigError: Ray cannot write its files (its sockets' path is too long)" in run.stderr


@pytest.mark.slow
def test_a_real_head_that_asks_for_a_token(tmp_path: Path) -> None:
    from ray_head import Head

    def preprocess(**variables: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [sys.executable, "-m", "pipelines.cli", "preprocess", "tiny", "--data.root", str(coco)]
        run = subprocess.run(
            [*command, "--data.shards", str(tmp_path / "shards")],
            env=inherited | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 2, run.stderr
        return run.stderr

    coco = tmp_path / "coco"
    write_coco(coco, {"train2017": [1], "val2017": [1]})
    nobody, stranger = tmp_path / "nobody", tmp_path / "stranger"
    nobody.mkdir()
    (stranger / ".ray").mkdir(parents=True)
    (stranger / ".ray" / "auth_token").write_text("cd" * 32)
    folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
    try:
        with Head(folder).running() as head:
            here = {"RAY_ADDRESS": f"127.0.0.1:{head.ports['port']}"}
            assert "cannot be joined" in preprocess(**here, HOME=str(nobody), RAY_AUTH_MODE="disabled")
            assert "asks for its token" in preprocess(**here, HOME=str(nobody), RAY_AUTH_MODE="token")
            assert "cannot be joined" in preprocess(**here, HOME=str(stranger), RAY_AUTH_MODE="token")
            here["RAY_ADDRESS"] = f"127.0.0.1:{head.ports['dashboard-port']}"
            assert "is no Ray's head" in preprocess(**here, HOME=str(head.home), RAY_AUTH_MODE="token")
    finally:
        shutil.rmtree(folder)
