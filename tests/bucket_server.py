"""A real S3 server (moto) on loopback, and in front of it a proxy that fails as asked.

The server runs in a process of its own. What is asked of the proxy goes on to it unchanged, except where a
`Fault` fits: then the proxy answers with an error, or is slow, as many times as the fault says.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from free_ports import free_port

HOP = ("content-length", "connection", "transfer-encoding", "date", "server", "expect")
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


@dataclass
class Fault:
    """What happens to requests whose method and path (with query) fit."""

    method: str
    path: str
    """Part of the path."""
    status: int = 0
    """Answered; 0 goes on to the server."""
    code: str = ""
    times: int = 10**6
    """How often; then requests pass."""
    delay: float = 0.0
    """Seconds before the answer, and before the last byte of its body."""


@dataclass
class Bucket:
    """The proxy's address, its faults, and (method, path) of all that was asked of it."""

    address: str
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.asked.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def running(host: str = "127.0.0.1") -> Iterator[Bucket]:
    """Server and proxy for the time of the block; the proxy listens on `host`."""
    port = free_port()
    with _process(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), port=port):
        proxy = ThreadingHTTPServer((host, 0), BaseHTTPRequestHandler)
        bucket = Bucket(f"http://{host}:{proxy.server_address[1]}")
        proxy.RequestHandlerClass = _handler(bucket, port)
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield bucket
        finally:
            proxy.shutdown()
            proxy.server_close()


@contextlib.contextmanager
def google() -> Iterator[dict[str, str]]:
    """An emulator of Google's storage, for the time of the block: the environment that leads there."""
    port = free_port()
    command = "import sys; from gcp_storage_emulator.server import create_server as c; "
    command += "s = c('127.0.0.1', int(sys.argv[1]), in_memory=True); s.run()"
    with _process(sys.executable, "-c", command, str(port), port=port):
        yield {"CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def azure(azurite: str) -> Iterator[dict[str, str]]:
    """Azurite (the path of `azurite-blob`) for the time of the block: the environment that leads there.
    Account and key are those that it is published with."""
    port = free_port()
    flags = "--inMemoryPersistence --skipApiVersionCheck --disableTelemetry --blobHost 127.0.0.1 --blobPort"
    with _process(azurite, *flags.split(), str(port), port=port):
        yield {
            "AZURE_STORAGE_ACCOUNT": "devstoreaccount1",
            "AZURE_STORAGE_KEY": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/"
            "K1SZFPTOtr/KBHBeksoGMGw==",
            "AZURE_STORAGE_SERVICE_ENDPOINT": f"http://127.0.0.1:{port}",
        }


@contextlib.contextmanager
def _process(*command: str, port: int) -> Iterator[None]:
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(server, port)
        yield
    finally:
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start (exit code {server.poll()})")


def _handler(bucket: Bucket, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a client that was killed is what tests are about
                super().handle()

        def handle_any(self) -> None:
            content = self._content()
            fault = bucket.fault(self.command, self.path)
            if fault:
                time.sleep(fault.delay)
            if fault and fault.status:
                body = ERROR.format(fault.code, "made by the test").encode()
                self._answer(fault.status, [("Content-Type", "application/xml")], body, 0.0)
                return
            server = http.client.HTTPConnection("127.0.0.1", port)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            server.request(self.command, self.path, content, headers)
            answer = server.getresponse()
            self._answer(answer.status, answer.getheaders(), answer.read(), fault.delay if fault else 0.0)
            server.close()

        def _content(self) -> bytes:
            """Whole: of a client that has gone meanwhile nothing is handed on."""
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self._read(int(self.headers.get("Content-Length") or 0))
            content = b""
            while size := int(self._line(), 16):
                content += self._read(size)
                self._line()
            while self._line().strip():  # trailers
                pass
            return content

        def _read(self, size: int) -> bytes:
            content = self.rfile.read(size)
            if len(content) < size:
                raise ConnectionError("the body was cut off")
            return content

        def _line(self) -> bytes:
            line = self.rfile.readline()
            if not line.endswith(b"\n"):
                raise ConnectionError("the body was cut off")
            return line

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, delay: float) -> None:
            self.send_response(status)
            told = {name.lower(): value for name, value in headers}
            for name, value in headers:
                if name.lower() not in HOP:
                    self.send_header(name, value)
            head = self.command == "HEAD"
            self.send_header("Content-Length", told.get("content-length", "0") if head else str(len(body)))
            self.end_headers()
            if not head:
                self.wfile.write(body[:-1])
                time.sleep(delay)
                self.wfile.write(body[-1:])

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    return Handler


def environment(bucket: Bucket) -> dict[str, str]:
    """What a user sets: credentials and the endpoint."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": bucket.address,
        "AWS_EC2_METADATA_DISABLED": "true",
        "PATH": os.environ["PATH"],
    }
