"""Before Serve: what a request's headers must be for Serve to read them, and turns for what is posted.

Serve's proxies and replicas decode headers as UTF-8 and answer 500 in plain text where one is not. Deploy
names `middlewares` in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, and Serve puts it in front of itself.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.haproxy import REQUEST_ID

AT_ONCE = 2
"""Requests at a turn of the loop: of half a millisecond each, where they are refused."""


class ReadableHeaders:
    """Headers as UTF-8; a request id that is not plain text is dropped, and Serve makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(name, _utf8(value)) for name, value in scope["headers"]]
            scope = {**scope, "headers": [h for h in headers if not _bad_request_id(*h)]}
        await self.app(scope, receive, send)


class Turns:
    """What is posted is begun a few at a time, at each turn of the event loop.

    All of a few hundred requests that come at once would be begun before anything else is looked at, and most
    of them refused: /readyz, and the answers of those before them, would wait behind the last one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "POST":
            loop = asyncio.get_running_loop()
            turn = loop.create_future()
            self._waiting.append(turn)
            if len(self._waiting) == 1:
                loop.call_soon(self._next)
            await turn
        await self.app(scope, receive, send)

    def _next(self) -> None:
        for _ in range(min(AT_ONCE, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():  # its client may have gone
                turn.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(Turns), Middleware(ReadableHeaders)]


def _utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()  # what HTTP says that it is
    return value


def _bad_request_id(name: bytes, value: bytes) -> bool:
    return name == b"x-request-id" and not REQUEST_ID.fullmatch(value.decode())
