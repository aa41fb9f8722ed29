"""The client, against the application over real HTTP and from an environment that holds nothing else."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_serve import BOXES, PNG, photo, save_tiny, service_of
from test_serve_protocols import running

from hrnet_core.images import decode_image, encode_png
from hrnet_core.predictor import PosePredictor
from serve import client
from serve.client import AsyncClient, Client, ServerError
from serve.routes import make_app

ROOT = Path(__file__).parents[1]
SECRET = "0123456789abcdef-client"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", 0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who asks\nclient {SECRET}\n")
    return file


@pytest.fixture(scope="module")
def url(checkpoint: Path, keys: Path) -> Iterator[str]:
    with running(make_app(service_of(checkpoint, keys=str(keys)))) as address:
        yield f"http://{address}"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HRNET_KEY", raising=False)


def keypoints_of(answer: Any) -> np.ndarray:
    return np.array([person["keypoints"] for person in answer["results"][0]["persons"]])


def test_every_address_is_asked_with_the_key(url: str, checkpoint: Path, tmp_path: Path) -> None:
    expected = PosePredictor.load(checkpoint, device="cpu")(photo(), BOXES)[0]
    file = tmp_path / "photo.png"
    file.write_bytes(encode_png(photo()))
    with Client(url, key=SECRET) as asking:
        np.testing.assert_allclose(
            keypoints_of(asking.poses(file, BOXES)), expected.keypoints.data, atol=1e-3
        )
        coco = asking.poses(file, BOXES, format="coco", image_id=9)
        assert [result["image_id"] for result in coco] == [9, 9, 9]
        assert len(asking.poses(str(file), BOXES, format="openpose")["people"]) == 3
        assert decode_image(asking.overlay(file, BOXES), apply_exif=False).shape == photo().shape
        assert asking.models()["models"][0]["checkpoint"] == str(checkpoint)
        with pytest.raises(ServerError, match="422 The bytes are not a picture") as caught:
            asking.poses(b"none")
        assert caught.value.problem["field"] == "image"
    with pytest.raises(ServerError, match="401"):
        client.poses(url, file)
    with pytest.raises(ValueError, match="expected an address"):
        Client("127.0.0.1:8000")


def test_many_come_in_order_with_their_failures_and_progress(url: str) -> None:
    pictures = [encode_png(photo(seed)) for seed in range(9)]
    pictures[4] = b"none"
    told: list[tuple[int, int | None]] = []
    with Client(url, key=SECRET) as asking:
        pairs = [(picture, BOXES[: i % 3 + 1]) for i, picture in enumerate(pictures)]
        found = list(asking.poses_of_many(pairs, at_once=3, progress=lambda *now: told.append(now)))
        alone = [None if i == 4 else asking.poses(*pair) for i, pair in enumerate(pairs)]
    assert [picture for picture, _ in found] == pictures
    assert told == [(i + 1, 9) for i in range(9)]
    for i, (_, answer) in enumerate(found):
        if i == 4:
            assert isinstance(answer, ServerError)
        else:
            np.testing.assert_allclose(keypoints_of(answer), keypoints_of(alone[i]), atol=1e-3)
    given = iter(pictures[:2])
    with Client(url, key=SECRET) as asking:
        assert len(list(asking.poses_of_many(given))) == 2


def test_asyncio_waits_for_many_at_once(url: str) -> None:
    picture = encode_png(photo())

    async def ask() -> list[Any]:
        async with AsyncClient(url, key=SECRET, at_once=4) as asking:
            answers = await asyncio.gather(*(asking.poses(picture, BOXES[:n]) for n in (1, 2, 3)))
            return [*answers, await asking.overlay(PNG), await asking.models()]

    *answers, png, models = asyncio.run(ask())
    assert [len(keypoints_of(answer)) for answer in answers] == [1, 2, 3]
    assert png.startswith(b"\x89PNG")
    assert models["models"][0]["version"] == "7"


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server, as long as the block lasts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def counting(close: bool) -> Iterator[tuple[str, list[str]]]:
    """A server that answers {} over connections that it keeps, or closes without a word; the lines asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(f"{self.client_address[1]} {self.requestline}")
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
            self.close_connection = close

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address, asked


@pytest.mark.parametrize("close", [False, True])
def test_a_connection_is_used_again_and_opened_again_without_a_wait(
    close: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = SimpleNamespace(sleep=lambda _: pytest.fail("nothing to wait for"))
    monkeypatch.setattr(client, "time", never)
    for address, asked in counting(close):
        with Client(address) as asking:
            for _ in range(3):
                assert asking.poses(PNG) == {}
        ports = {line.split()[0] for line in asked}
        assert (len(asked), len(ports)) == (3, 3 if close else 1)


@pytest.fixture
def scripted() -> Iterator[tuple[str, list[tuple[int, dict[str, str], bytes]], list[str]]]:
    """A server that gives the answers that are put into a list, one after the other; the paths asked."""
    answers: list[tuple[int, dict[str, str], bytes]] = []
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(f"{self.path} {self.headers['Authorization']}")
            status, headers, body = answers.pop(0)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address, answers, asked


def test_answers_that_are_not_the_endpoints_are_told(scripted: Any) -> None:
    """A proxy that wants https, another server at that address."""
    url, answers, _ = scripted
    answers += [(307, {"Location": "https://poses.example/v1/poses"}, b""), (200, {}, b"<html>hello</html>")]
    with Client(url) as asking:
        with pytest.raises(ServerError, match=r"307 .* sends on to https://poses.example/v1/poses: give the"):
            asking.poses(PNG)
        with pytest.raises(
            ServerError, match="200 OK: the answer begins with b'<html>hello</html>', no JSON"
        ):
            asking.poses(PNG)


def test_a_wait_longer_than_the_limit_of_time_is_not_waited(
    scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers, asked = scripted
    waited: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    answers += [(429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "86400"}, b'{"title": "later"}')]
    with Client(url, timeout_s=10) as asking, pytest.raises(ServerError, match="429 later"):
        asking.poses(PNG)
    assert (len(asked), waited) == (2, [7.0])


def test_what_is_given_wrong_is_told_before_anything_is_sent(scripted: Any) -> None:
    url, answers, asked = scripted
    with Client(url) as asking:
        with pytest.raises(TypeError, match="a picture is a file's name or its bytes, got ndarray"):
            asking.poses(np.zeros((4, 4, 3), np.uint8))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"boxes are \[\[x, y, w, h\], \.\.\.\].*got \[1, 2, 3, 4\]"):
            asking.poses(PNG, [1, 2, 3, 4])  # type: ignore[list-item]
        for one in ("photo.jpg", PNG):
            with pytest.raises(TypeError, match="takes a list of pictures"):
                next(asking.poses_of_many(one))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attempts must be 1 or more"):
        Client(url, attempts=0)
    assert asked == []
    # The address as curl has it, a key as a file has it, bytes of another kind.
    answers.append((200, {}, b"{}"))
    assert client.poses(f"{url}/v1/poses", bytearray(PNG), key="secret\n") == {}  # type: ignore[arg-type]
    assert asked == ["/v1/poses Bearer secret"]


def test_of_many_none_is_lost(scripted: Any) -> None:
    """None, as a look-up may give it, was taken for the end."""
    url, answers, _ = scripted
    answers += [(200, {}, b"{}")] * 4
    given: list[Any] = [PNG, None, PNG, PNG, None, PNG]
    with Client(url) as asking:
        found = list(asking.poses_of_many(given, at_once=1))
    assert [picture for picture, _ in found] == given
    assert [answer if answer == {} else type(answer) for _, answer in found] == [
        {},
        TypeError,
        {},
        {},
        TypeError,
        {},
    ]


def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, asked in counting(False):
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.delenv("no_proxy")
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert client.poses("http://poses.example/base", PNG) == {}
        assert asked[0].split()[1:3] == ["POST", "http://poses.example/base/v1/poses"]


@pytest.mark.slow
def test_it_works_where_nothing_else_is_installed(url: str, keys: Path, tmp_path: Path) -> None:
    """The wheel, without what it needs otherwise, in an environment of its own."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("hrnet_core", "pipelines", "serve"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "own")
    own = tmp_path / "own" / "bin" / "python"
    subprocess.run([*pip, "--python", own, "install", "-q", "--no-deps", wheel], check=True)
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(PNG)
    command = [own, "-I", "-m", "serve.client", url, "--key-file", keys, "0.png", "1.png", "2.png"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("2.png: [Errno 2]")
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert [answer["file"] for answer in answers] == ["0.png", "1.png"]
    assert keypoints_of(answers[0]).shape == (1, 17, 3)
    program = "import sys, serve.client; print(*{'numpy', 'ray', 'torch', 'httpx'} & set(sys.modules))"
    loaded = subprocess.run([own, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_people_are_found_where_that_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    from test_serve_detector import PNG as red
    from test_serve_detector import crowd
    from test_serve_detector import service_of as with_detector

    service = with_detector(checkpoint, crowd(tmp_path))
    with running(make_app(service)) as address, Client(f"http://{address}") as asking:
        assert keypoints_of(asking.poses(red)).shape == (3, 17, 3)
        assert keypoints_of(asking.poses(red, score_threshold=0.1, max_found=2)).shape == (2, 17, 3)
        whole = asking.poses(red, boxes_from="whole_image")
        assert whole["results"][0]["boxes_source"] == "whole_image"
        assert len(asking.poses(red, format="coco", max_found=2)) == 2
        assert decode_image(asking.overlay(red, max_found=1), apply_exif=True).shape == (320, 640, 3)
        many = [answer for _, answer in asking.poses_of_many([red, red], max_found=1)]
        assert [len(keypoints_of(answer)) for answer in many] == [1, 1]
        (tmp_path / "red.png").write_bytes(red)
        argv = [f"http://{address}", str(tmp_path / "red.png"), "--boxes-from", "whole_image"]
        told = subprocess.run([sys.executable, "-m", "serve.client", *argv], capture_output=True, text=True)
        assert json.loads(told.stdout)["results"][0]["boxes_source"] == "whole_image"
