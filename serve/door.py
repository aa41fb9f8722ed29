"""In front of the routes: who would find no place is told so before anything is done for the request."""

from __future__ import annotations

from fastapi import Request
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.envelope import as_response
from serve.schemas import Problem
from serve.service import PoseService


class Door:
    """Refuses requests for poses that the service would refuse whatever they hold: without a key, or with
    every place taken.

    The routes refuse them too, later. By then FastAPI has read parameters and called its layers, on the event
    loop that clients with a place, and /readyz, share with those who ask again and again.
    """

    def __init__(self, app: ASGIApp, service: PoseService) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "POST" and (route := _route_of(scope)):
            request = Request(scope)
            try:
                self.service.expect(request)
            except Problem as error:
                scope["route"] = route  # for the log and the metrics
                response = await as_response(request, error)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _route_of(scope: Scope) -> BaseRoute | None:
    """Of what takes pictures: all that is posted to."""
    app: Starlette = scope["app"]
    return next((route for route in app.routes if route.matches(scope)[0] is Match.FULL), None)
