"""Serve's Python proxy in front, as where there is no HAProxy: gRPC, and headers that do not end."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from free_ports import free_ports
from test_live import Endpoint, check_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def endpoint(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from ray import serve

    endpoint = Endpoint(tmp_path_factory.mktemp("python"), *free_ports(2))
    endpoint.settings = endpoint.settings.model_copy(update={"haproxy": False})
    try:
        endpoint.deploy(0)
        yield endpoint
    finally:
        serve.shutdown()


def test_grpc_is_answered_by_the_python_proxy(endpoint: Endpoint) -> None:
    check_grpc(endpoint)


def test_connections_whose_headers_do_not_end_take_no_place(endpoint: Endpoint) -> None:
    """It gives none of them up, and answers the others."""
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port))) for _ in range(200)
        ]
        for byte in b"POST /v1/poses HTTP/1.1\r\n":
            for connection in held:
                connection.send(bytes([byte]))
            time.sleep(0.02)
        assert endpoint.settings.max_requests < len(held)
        assert endpoint.check(endpoint.ask().json()) in endpoint.sha256
