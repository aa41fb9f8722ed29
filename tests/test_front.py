"""What stands before Serve in each of its HTTP servers: turns and headers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from serve.front import ReadableHeaders, Turns, middlewares


async def nothing(*_: Any) -> None:
    raise AssertionError


def test_hundreds_of_posted_requests_let_others_through() -> None:
    begun: list[str] = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        for _ in range(5):  # as many turns of the loop as Serve's own layers take, and more
            await asyncio.sleep(0)
        begun.append(scope["method"])

    async def together() -> None:
        front = Turns(app)
        methods = ["POST"] * 200 + ["GET"]
        await asyncio.gather(*(front({"type": "http", "method": m}, nothing, nothing) for m in methods))

    asyncio.run(together())
    assert len(begun) == 201
    assert begun.index("GET") < 20, "asked for last, it waited behind all that was posted"


def test_one_that_gives_up_holds_up_nobody() -> None:
    begun: list[int] = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        begun.append(scope["number"])

    async def one_goes() -> None:
        front = Turns(app)
        scopes = [{"type": "http", "method": "POST", "number": number} for number in range(9)]
        running = [asyncio.create_task(front(scope, nothing, nothing)) for scope in scopes]
        await asyncio.sleep(0)
        running[4].cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await front({"type": "http", "method": "POST", "number": 9}, nothing, nothing)

    asyncio.run(one_goes())
    assert begun == [0, 1, 2, 3, 5, 6, 7, 8, 9], "in the order in which they came"


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ((b"x-name", "Zoë".encode("latin-1")), (b"x-name", "Zoë".encode())),
        ((b"x-name", "Zoë".encode()), (b"x-name", "Zoë".encode())),
        ((b"x-request-id", b"camera-1"), (b"x-request-id", b"camera-1")),
        ((b"x-request-id", b"two words"), None),
        ((b"x-request-id", "Zoë".encode("latin-1")), None),
    ],
)
def test_headers_are_such_as_serve_can_read(
    sent: tuple[bytes, bytes], read: tuple[bytes, bytes] | None
) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        seen.append(scope)

    scope = {"type": "http", "method": "GET", "headers": [(b"host", b"here"), sent]}
    asyncio.run(ReadableHeaders(app)(scope, nothing, nothing))
    assert seen[0]["headers"] == [(b"host", b"here"), *([read] if read else [])]


def test_serve_gets_both() -> None:
    assert [one.cls for one in middlewares()] == [Turns, ReadableHeaders]
