"""The HTTP side of a service: its routes, its page, and a problem for whatever goes wrong."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrnet_core.images import encode_png
from hrnet_core.overlays import draw_poses
from hrnet_core.results import Poses
from serve.body import REQUEST_BODY
from serve.methods import Methods
from serve.schemas import ModelsAnswer, PosesAnswer, Problem, ProblemAnswer
from serve.service import Metrics, PoseService, logger

Threshold = Annotated[float, Query(ge=0, le=1)]


class Envelope:
    """Around every request: an id for it, its status counted, and no exception without an answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        # Serve's proxies set the header where the client did not, and return it with the answer.
        request.state.request_id = request.headers.get("x-request-id") or str(uuid.uuid4())
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # The route's own path: a series for each path that a stranger invents would have no end.
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.inc(tags={"path": path, "status": str(status)})
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception as error:
            logger.exception("request %s failed", request.state.request_id)
            if status:
                raise  # too late to answer anything else
            response = await _as_response(request, error)
            await response(scope, receive, counted)


async def _as_response(request: Request, error: Exception) -> Response:
    problem = _as_problem(request, error)
    return JSONResponse(
        problem.body(request.url.path, request.state.request_id),
        problem.status,
        headers=problem.headers,
        media_type="application/problem+json",
    )


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


def make_app(service: PoseService) -> FastAPI:
    """The HTTP side of a service."""
    problem = {"application/problem+json": {"schema": ProblemAnswer.model_json_schema()}}
    app = FastAPI(
        title="hrnet pose",
        version="1",
        description="Keypoints of people in photographs. Errors are RFC 9457 problem+json.",
        docs_url=None,  # FastAPI's loads its scripts from elsewhere; ours is docs.html
        redoc_url=None,
        responses={"default": {"description": "A problem.", "content": problem}},
    )
    app.add_middleware(Methods)
    app.add_middleware(Envelope, metrics=service.metrics)
    for kind in (Problem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _as_response)
    _add_poses(app, service)
    _add_state(app, service)
    _add_page(app, service)
    return app


def _add_poses(app: FastAPI, service: PoseService) -> None:
    @app.post("/v1/poses", response_model=PosesAnswer, openapi_extra={"requestBody": REQUEST_BODY})
    async def poses(request: Request) -> Response:
        """Keypoints of each box, in its order; without boxes, of the whole picture as one person."""
        answer, _ = await service.answer(request)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post(
        "/v1/overlay",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "The picture with its poses."}},
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def overlay(request: Request, threshold: Threshold = 0.3) -> Response:
        """The displayed picture with boxes and with the keypoints that score above `threshold`, as PNG."""
        answer, ((decoded, poses),) = await service.answer(request, draw=True)
        png = await asyncio.to_thread(_drawn, decoded.image, poses, threshold)
        return Response(png, media_type="image/png", headers={"X-Model-Version": answer.model.version})


def _drawn(image: NDArray[np.uint8], poses: Poses, threshold: float) -> bytes:
    points = poses.keypoints
    return encode_png(draw_poses(image, points.xy, points.conf, poses.skeleton, threshold, poses.boxes.xywh))


def _add_state(app: FastAPI, service: PoseService) -> None:
    @app.get("/v1/models", response_model=ModelsAnswer)
    async def models() -> ModelsAnswer:
        """The model that answers, as it was loaded; the one that is to answer; the one before."""
        return service.models()

    @app.get("/livez")
    async def livez() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """A model is loaded; 503 with the reason where none is."""
        model = service.ready()
        return {"ready": True, "model": model.info(), "last_load_error": service.failure}


def _add_page(app: FastAPI, service: PoseService) -> None:
    # Nothing of the page comes from elsewhere, and nothing else may run in it.
    policy = {"Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:"}

    def add(path: str, file: str, media_type: str) -> None:
        content = Path(__file__).with_name(file).read_bytes()

        @app.get(path, include_in_schema=False)
        async def static() -> Response:
            return Response(content, media_type=media_type, headers=policy)

    add("/", "page.html", "text/html")
    add("/page.css", "page.css", "text/css")
    add("/page.js", "page.js", "text/javascript")
    add("/docs", "docs.html", "text/html")
    add("/docs.js", "docs.js", "text/javascript")

    @app.get("/samples", include_in_schema=False)
    async def samples() -> list[dict[str, Any]]:
        return [{"name": name, "boxes": sample.boxes} for name, sample in service.samples.items()]

    @app.get("/samples/{name}", include_in_schema=False)
    async def sample(name: str) -> Response:
        if name not in service.samples:
            raise Problem("not-found", f"{name}: no such sample; /samples lists them.")
        return Response(service.samples[name].data, media_type=service.samples[name].media_type)
