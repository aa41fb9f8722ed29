"""HEAD and OPTIONS of every address, which FastAPI's routes leave out."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Methods:
    """HEAD is GET without the body; OPTIONS says what an address takes (204, Allow). Addresses that are not
    there stay 404."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        if method == "OPTIONS" and (allowed := _allowed(scope)):
            await Response(status_code=204, headers={"Allow": ", ".join(allowed)})(scope, receive, send)
        elif method == "HEAD" and "GET" in _allowed(scope):

            async def without_body(message: Message) -> None:
                if message["type"] == "http.response.body":
                    message = {**message, "body": b""}
                await send(message)

            scope["method"] = "GET"  # the scope itself: whoever looks at it later finds its route there
            await self.app(scope, receive, without_body)
        else:
            await self.app(scope, receive, send)


def _allowed(scope: Scope) -> list[str]:
    """Methods of the address that was asked for; none where nothing is."""
    app: Starlette = scope["app"]
    fitting = [route for route in app.routes if _fits(route, scope)]
    methods = {method for route in fitting for method in getattr(route, "methods", None) or ()}
    if not methods:
        return []
    return sorted({*methods, "OPTIONS", *({"HEAD"} if "GET" in methods else ())})


def _fits(route: BaseRoute, scope: Scope) -> bool:
    return hasattr(route, "methods") and route.matches(scope)[0] != Match.NONE
