"""Around every request: its id, its headers, who may ask, a problem for whatever goes wrong, the log."""

from __future__ import annotations

import json
import re
import time
import uuid
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.haproxy import REQUEST_ID
from serve.metrics import Outcome
from serve.schemas import Problem
from serve.service import PoseService, logger
from serve.traces import UNTRACED

SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Headers of every answer that does not have them otherwise."""
PROBES = (
    "/livez",
    "/readyz",
    "/v2/health/live",
    "/v2/health/ready",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
"""Asked every few seconds by machines: logged where they are not answered with 200."""
LOGGED = ("request_id", "slug", "reason", "key", "pictures", "people")


class Envelope:
    """Around every request: an id for it, its end counted, and no exception without an answer.

    hosts: names that it may be addressed to; () for any.
    """

    def __init__(self, app: ASGIApp, service: PoseService, hosts: tuple[str, ...]) -> None:
        self.app = app
        self.service = service
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, started = Request(scope), time.perf_counter()
        # Serve's proxies set the header where the client did not, and return it with the answer.
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        traces, traced = self.service.traces, request.url.path not in PROBES
        given = request.state.request_id
        spans = traces.began(request.method, request.headers, given) if traced else UNTRACED
        request.state.spans, status, seconds = spans, 0, 0.0

        async def counted(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - started
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check_host(request)
            await self.app(scope, receive, counted)
        except Problem as error:
            response = await as_response(request, error)
            await response(scope, receive, counted)
        except Exception as error:
            logger.exception("request %s failed", request.state.request_id)
            if status:
                raise  # too late to answer anything else
            response = await as_response(request, error)
            await response(scope, receive, counted)
        finally:
            if status:  # nobody waits for the log
                self._ended(request, status, seconds)
            spans.end()

    def _check_host(self, request: Request) -> None:
        """A page from elsewhere, whose name was made to lead here, must not ask in its visitor's name."""
        allowed = self.hosts
        host = re.sub(r":\d+$", "", request.headers.get("host", "")).lower()
        if allowed and not {host, "*"} & set(allowed) and request.url.path not in ("/livez", "/readyz"):
            raise Problem("misdirected", f"{host or 'no name'}: not a host of this endpoint (--serve.hosts).")

    def _ended(self, request: Request, status: int, seconds: float) -> None:
        known = request.scope["state"]  # what was put there on the way
        path = getattr(request.scope.get("route"), "path", "other")
        names = ("slug", "reason", "key", "model", "stages")
        told = {name: known[name] for name in names if name in known}
        self.service.metrics.ended(Outcome(path, status, seconds, **told))
        self.service.metrics.show(self.service.room)
        known["spans"].answered(request.method, path, status, _traced(known))
        if path not in PROBES or status != 200:
            _log(request, path, status, seconds)


def _traced(known: dict[str, Any]) -> dict[str, Any]:
    """What a trace says of a request, beside method, route, status and id."""
    names = "slug", "reason", "pictures", "people"
    told: dict[str, Any] = {name: known[name] for name in names if name in known}
    if "model" in known:
        told |= {"version": known["model"].version, "mode": known["model"].mode}
    return told


def _log(request: Request, path: str, status: int, seconds: float) -> None:
    """A line for a request that has ended. Of what the client sent its id alone: no picture, box or key."""
    known = request.scope["state"]
    told = {name: known[name] for name in LOGGED if known.get(name) not in (None, "")}
    if trace_id := known["spans"].trace_id:
        told["trace_id"] = trace_id
    if "model" in known:
        told["version"] = known["model"].version
    for stage, spent in known.get("stages", {}).items():
        told[f"{stage}_ms"] = round(1000 * spent, 2)
    milliseconds = round(1000 * seconds, 2)
    fields = {"status": status, "path": path, "ms": milliseconds, **told, "log_to_stderr": False}
    logger.info("%s %s %d %.1f ms", request.method, path, status, milliseconds, extra=fields)


async def as_response(request: Request, error: Exception) -> Response:
    problem = _as_problem(request, error)
    request.state.slug, request.state.reason = problem.slug, problem.members.get("reason", "")
    body = problem.body(request.url.path, request.state.request_id)
    # What the client sent may stand in it, such as half a surrogate pair, which is no text.
    if request.url.path.startswith("/v2"):
        body["error"] = problem.detail  # where that protocol's clients look
    content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return Response(content, problem.status, problem.headers, "application/problem+json")


async def known_parameters(request: Request) -> None:
    """Problem for a query parameter that the address does not know: it would be ignored. Pages are for
    people, who follow links with more in them.

    Asynchronous although it waits for nothing: what is not, FastAPI calls in a thread.
    """
    if not request.url.path.startswith(("/v1/", "/v2")):
        return
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for unknown in sorted(set(request.query_params) - known):
        there_are = f"there are {', '.join(sorted(known))}" if known else "there are none"
        raise Problem.of_field(unknown, "invalid-field", f"unknown query parameter; {there_are}.")


def _as_problem(request: Request, error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return Problem.of_field(field, "invalid-field", f"{first['msg']}.")
    if not isinstance(error, HTTPException):
        what = "this is a defect here, not in the request. The log has the details under the request id."
        return Problem("internal-error", what)
    slug = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code)
    detail = f"{request.method} {request.url.path}: see /docs for what there is."
    if slug is None:
        slug, detail = "malformed-body", str(error.detail)
    return Problem(slug, detail, headers=dict(error.headers or {}))
