"""Before Serve: what a request's headers must be for Serve to read them.

Serve's proxies and replicas decode headers as UTF-8 and answer 500 in plain text where one is not. Deploy
names `middlewares` in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, and Serve puts it in front of itself.
"""

from __future__ import annotations

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

REQUEST_ID = re.compile(r"[!-~]{1,128}")
"""A request id that is taken over from a client: what every log, header and JSON text can hold as it is."""


class ReadableHeaders:
    """Headers as UTF-8; a request id that is not plain text is dropped, and Serve makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(name, _utf8(value)) for name, value in scope["headers"]]
            scope = {**scope, "headers": [h for h in headers if not _bad_request_id(*h)]}
        await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(ReadableHeaders)]


def _utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()  # what HTTP says that it is
    return value


def _bad_request_id(name: bytes, value: bytes) -> bool:
    return name == b"x-request-id" and not REQUEST_ID.fullmatch(value.decode())
