"""Load: arrivals that wait for nothing, and figures that say what was answered."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_serve import BOXES, photo, save_tiny, service_of
from test_serve_protocols import running

from hrnet_core.errors import ConfigError, DataError, Failure
from hrnet_core.images import encode_png
from pipelines.cli import main
from pipelines.load import Load, Outcome, Row, arrivals, load
from serve.routes import make_app

ANSWER = json.dumps({"results": [{"persons": [{}, {}]}]}).encode()
SECRET = "0123456789abcdef-load"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HRNET_KEY", raising=False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(encode_png(photo()))
    return folder


@contextmanager
def answering(status: Callable[[], int]) -> Iterator[tuple[str, list[int]]]:
    """A server that answers each POST with a status, 0: not at all; and the statuses so far."""
    said: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            code = status()
            said.append(code)
            if not code:
                self.close_connection = True
                return
            body = ANSWER if code == 200 else b"{}"
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", said
    server.shutdown()
    server.server_close()


def test_requests_come_whether_or_not_the_others_are_answered(pictures: Path) -> None:
    """Nobody gets an answer before all twenty are there: a client that waits would never have the first."""
    gathered, first = threading.Barrier(20), threading.Event()

    def status() -> int:
        if first.is_set():
            gathered.wait(timeout=60)
        first.set()  # the one request before
        return 200

    with answering(status) as (url, said):
        (row,) = load(url, [str(pictures)], rates=[40], seconds=0.5, even=True).rows
    assert [outcome.status for outcome in row.outcomes] == ["200"] * 20
    assert row.figures()["people_per_s"] == pytest.approx(40 / row.figures()["seconds"])
    assert len(said) == 21


def test_each_answer_is_counted_and_nothing_is_sent_again(pictures: Path) -> None:
    order = iter([200, 200, 429, 429, 429, 503, 404, 200, 200])
    with answering(lambda: next(order)) as (url, said):
        figures = load(url, [str(pictures)], rates=[8], seconds=1).rows[0].figures()
    assert len(said) == 9
    assert figures["statuses"] == {"200": 3, "404": 1, "429": 3, "503": 1}
    assert figures["share_429"] == 3 / 8
    order = itertools.chain([200], itertools.repeat(0))
    with answering(lambda: next(order)) as (url, said):
        figures = load(url, [str(pictures)], rates=[8], seconds=0.5).rows[0].figures()
    assert figures["statuses"] == {"no connection": 4}


def test_figures_are_those_of_the_requests() -> None:
    waits = np.arange(1, 101) / 1000
    good = [Outcome(i * 0.1, i * 0.1, i * 0.1 + wait, "200", 2) for i, wait in enumerate(waits)]
    bad = [Outcome(1.0, 1.0, 9.0, "429"), Outcome(2.0, 2.5, 20.0, "timeout")]
    row = Row(10.0, (*good, *bad))
    figures = row.figures()
    assert [round(figures[f"p{p}_ms"]) for p in (50, 95, 99)] == [51, 96, 100], (
        "of the answered, the next higher"
    )
    assert figures["seconds"] == 20.0
    assert figures["answered_per_s"] == 5.0
    assert figures["people_per_s"] == 10.0
    assert figures["sent_late"] == 1
    assert figures["latest_s"] == 0.5
    table = str(Load("http://a", 1, (row,)))
    assert "1 x timeout" in table
    assert "1 of 102 were sent more than 100 ms after they were due" in table
    nothing = Load("http://a", 1, (Row(1.0, (Outcome(0, 0, 1, "503"),)),))
    assert "p50_ms" not in nothing.as_dict()["rates"][0]
    json.dumps(nothing.as_dict(), allow_nan=False)
    assert "1 x 503" in str(nothing)


def test_arrivals_are_as_many_as_the_rate_says() -> None:
    np.testing.assert_allclose(arrivals(4, 2, even=True, seed=0), np.arange(8) / 4)
    times = arrivals(50, 200, even=False, seed=3)
    assert len(times) == 10_000
    assert times[0] == 0
    gaps = np.diff(times)
    assert gaps.min() >= 0
    # Of a Poisson process: exponential, whose deviation is its mean.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)
    np.testing.assert_array_equal(times, arrivals(50, 200, even=False, seed=3))
    assert (times != arrivals(50, 200, even=False, seed=4)).any()


def test_an_endpoint_with_keys_by_the_command(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text(f"load {SECRET}\n")
    (tmp_path / "boxes.json").write_text(json.dumps({"a.png": BOXES, "b.png": BOXES[:1], "c.png": []}))
    service = service_of(save_tiny(tmp_path / "tiny", 0), keys=str(tmp_path / "keys"))
    command = ["--boxes", str(tmp_path / "boxes.json"), "--rates", "4", "8", "--seconds", "1", "--even"]
    with running(make_app(service)) as address:
        asked = ["load", f"http://{address}", str(pictures), *command, "--json", str(tmp_path / "load.json")]
        assert main(asked) == 2
        assert "401" in capsys.readouterr().err
        assert main([*asked, "--key-file", str(tmp_path / "keys")]) == 0
    shown = capsys.readouterr().out
    assert "p99 ms" in shown
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["pictures"] == 2, "c.png has no box"
    for row, sent in zip(written["rates"], (4, 8), strict=True):
        assert row["statuses"] == {"200": sent}
        assert row["people_per_s"] * row["seconds"] == pytest.approx(sent / 2 * (3 + 1))


def test_what_cannot_be_asked_is_said_at_once(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("none")
    with pytest.raises(ConfigError, match="expected an address"):
        load("127.0.0.1:8000", [str(pictures)])
    with pytest.raises(DataError, match="nowhere"):
        load("http://127.0.0.1:9", [str(tmp_path / "nowhere")])
    with pytest.raises(Failure, match="does not answer"):
        load("http://127.0.0.1:9", [str(pictures)])
    with pytest.raises(ConfigError, match="no-keys"):
        load("http://127.0.0.1:9", [str(pictures)], key_file=str(tmp_path / "no-keys"))
    statuses = itertools.repeat(422)
    with answering(lambda: next(statuses)) as (url, said), pytest.raises(ConfigError, match="422"):
        load(url, [str(pictures)])
    assert said == [422]
