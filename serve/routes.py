"""The HTTP side of a service: its routes, its page, and a problem for whatever goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from hrnet_core.errors import DataError
from hrnet_core.images import encode_png
from hrnet_core.overlays import draw_poses
from hrnet_core.results import Poses
from serve.detector import BoxesFrom, Find
from serve.door import Door
from serve.envelope import Envelope, as_response, known_parameters
from serve.methods import Methods
from serve.model import ServedModel
from serve.openapi import REQUEST_BODY, describe
from serve.schemas import UNTOLD, CocoResult, ModelsAnswer, OpenPoseAnswer, PosesAnswer, Problem
from serve.service import PoseService, Protocol
from serve.traces import spans_of
from serve.v2 import HEADER_LENGTH, SERVER, answer_of_v2, metadata, uploads_of_v2

Format = Literal["native", "coco", "openpose"]
ScoreThreshold = Annotated[
    float | None, Query(ge=0, le=1, description="Of people that the detector finds. Default: the endpoint's.")
]
MaxFound = Annotated[
    int | None, Query(ge=1, description="Most people that are found in a picture. Default: the endpoint's.")
]
CocoId = Annotated[int, Query(ge=0, le=2**53)]
Threshold = Annotated[float, Query(ge=0, le=1)]


def make_app(service: PoseService) -> FastAPI:
    """The HTTP side of a service."""
    app = FastAPI(
        title="hrnet pose",
        version="1",
        description="Keypoints of people in photographs. Errors are RFC 9457 problem+json.",
        docs_url=None,  # FastAPI's loads its scripts from elsewhere; ours is docs.html
        redoc_url=None,
        dependencies=[Depends(known_parameters)],
        generate_unique_id_function=lambda route: route.name,  # for clients that are made of openapi.json
    )
    # The last one is asked first: a page's OPTIONS is CORS's, others are Methods'; HEAD tells what is packed.
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)
    app.add_middleware(Methods)
    app.add_middleware(Door, service=service)
    if service.args.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.args.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After", "X-Model-Version", "X-Warning"],
            max_age=600,
        )
    app.add_middleware(Envelope, service=service, hosts=service.args.hosts)
    for kind in (Problem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, as_response)
    _add_poses(app, service)
    _add_state(app, service)
    _add_v2(app, service)
    describe(app, service.args, service.keys.wanted)
    _add_page(app, service)
    return app


def _add_poses(app: FastAPI, service: PoseService) -> None:
    formats = PosesAnswer | list[CocoResult] | OpenPoseAnswer

    @app.post("/v1/poses", response_model=formats, openapi_extra={"requestBody": REQUEST_BODY})
    async def poses(
        request: Request,
        format: Format = "native",
        image_id: CocoId = 1,
        category_id: CocoId = 1,
        boxes_from: BoxesFrom = "auto",
        score_threshold: ScoreThreshold = None,
        max_found: MaxFound = None,
    ) -> Response:
        """Keypoints of each box, in its order.

        Pictures without boxes, `boxes_from`: `detector` finds their people, `whole_image` takes each as one
        person; `auto` is the detector where the endpoint has one (/v1/models), else the whole picture.
        `native` is the answer with `results`. `coco`: a list of COCO keypoint results; pictures are numbered
        from `image_id`, everyone has `category_id`. `openpose`: OpenPose's JSON of one picture, its 18
        keypoints.
        """
        request.state.find = Find(boxes_from=boxes_from, score_threshold=score_threshold, max_found=max_found)
        answered = await service.answer(request)
        headers = {"X-Model-Version": answered.answer.model.version}
        with spans_of(request).stage("encode"):
            content = answered.answer.model_dump_json()
            if format != "native":
                told = _as_format(format, answered.poses, image_id, category_id)
                content = json.dumps(told, allow_nan=False)
        return Response(content, headers=headers, media_type="application/json")

    @app.post(
        "/v1/overlay",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "The picture with its poses."}},
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def overlay(
        request: Request,
        threshold: Threshold = 0.3,
        boxes_from: BoxesFrom = "auto",
        score_threshold: ScoreThreshold = None,
        max_found: MaxFound = None,
    ) -> Response:
        """The displayed picture with boxes and with the keypoints that score above `threshold`, as PNG. Boxes
        as of /v1/poses."""

        def drawn(image: NDArray[np.uint8], poses: Poses) -> bytes:
            points, boxes = poses.keypoints, poses.boxes.xywh
            return encode_png(draw_poses(image, points.xy, points.conf, poses.skeleton, threshold, boxes))

        request.state.find = Find(boxes_from=boxes_from, score_threshold=score_threshold, max_found=max_found)
        answered = await service.answer(request, drawn)
        headers = {"X-Model-Version": answered.answer.model.version}
        if warnings := answered.answer.results[0].warnings:
            headers["X-Warning"] = warnings[0]
        return Response(answered.file, media_type="image/png", headers=headers)


def _as_format(name: str, poses: list[Poses], image_id: int, category_id: int) -> Any:
    """The people of a request as other programs read them. Problem where they cannot be said so."""
    if name == "coco":
        return [result for i, one in enumerate(poses) for result in one.to_coco(image_id + i, category_id)]
    if len(poses) > 1:
        raise Problem.of_field("image", "too-many-images", "an OpenPose answer is of one picture.", limit=1)
    try:
        return poses[0].to_openpose()
    except DataError as error:
        raise Problem.of_field("format", "invalid-field", str(error)) from None


def _add_v2(app: FastAPI, service: PoseService) -> None:
    """The Open Inference Protocol: named and typed tensors instead of pictures and people (v2.py)."""
    protocol, model = Protocol((), uploads_of_v2), "/v2/models/{name}"
    hidden: dict[str, Any] = {"include_in_schema": False}  # it has a schema of its own

    @app.get("/v2", **hidden)
    async def server() -> dict[str, Any]:
        return {**SERVER, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", **hidden)
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", **hidden)
    async def ready() -> dict[str, bool]:
        service.ready()
        return {"ready": True}

    @app.get(f"{model}/ready", **hidden)
    @app.get(f"{model}/versions/{{version}}/ready", **hidden)
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        return {"name": model_named(service, name, version).choice.name, "ready": True}

    @app.get(model, **hidden)
    @app.get(f"{model}/versions/{{version}}", **hidden)
    async def described(name: str, version: str | None = None) -> dict[str, Any]:
        served = model_named(service, name, version)
        return metadata(served.info(), served.predictor.spec.skeleton.num_keypoints)

    @app.post(f"{model}/infer", **hidden)
    @app.post(f"{model}/versions/{{version}}/infer", **hidden)
    async def inference(request: Request, name: str, version: str | None = None) -> Response:
        model_named(service, name, version)
        answered = await service.answer(request, protocol=protocol)
        warnings = [warning for result in answered.answer.results for warning in result.warnings]
        sources = [result.boxes_source for result in answered.answer.results]
        more: dict[str, Any] = {"request_id": answered.answer.request_id, "boxes_source": sources}
        more |= {"warnings": warnings} if warnings else {}
        with spans_of(request).stage("encode"):
            content, length = answer_of_v2(request.state.wish, answered.answer.model, answered.poses, more)
        if length == len(content):
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream")


def model_named(service: PoseService, name: str, version: str | None) -> ServedModel:
    """The model that answers, where it is called so. Problem (404) where not, (503) where there is none."""
    served = service.ready()
    if name != served.choice.name or version not in (None, served.choice.version):
        here = f"{served.choice.name} {served.choice.version}"
        raise Problem("not-found", f"{name} {version or ''}: no such model; here is {here}.")
    return served


def _add_state(app: FastAPI, service: PoseService) -> None:
    @app.get("/v1/models", response_model=ModelsAnswer)
    async def models(request: Request) -> ModelsAnswer:
        """The model that answers, as it was loaded; the one that is to answer; the one before. Where keys are
        asked for, who sends none is not told where they lie and what they were made of."""
        answer = service.models()
        if service.keys.wanted and service.keys.holder(request.headers.get("authorization")) is None:
            return answer.without_paths()
        return answer

    @app.get("/livez")
    async def livez() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """A model is loaded; 503 with the reason where none is."""
        model, error = service.ready(), service.failure
        if service.keys.wanted:
            error = error and UNTOLD
        return {"ready": True, "model": model.info(), "last_load_error": error}


def _add_page(app: FastAPI, service: PoseService) -> None:
    # Nothing of the page comes from elsewhere, and nothing else may run in it.
    policy = {
        "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
        "Cache-Control": "no-cache",
    }

    def add(path: str, file: str, media_type: str) -> None:
        content = (Path(__file__).parent / "page" / file).read_bytes()

        @app.get(path, include_in_schema=False)
        async def static() -> Response:
            return Response(content, media_type=media_type, headers=policy)

    add("/", "page.html", "text/html")
    add("/page.css", "page.css", "text/css")
    add("/docs", "docs.html", "text/html")
    for script in ("page.js", "picture.js", "boxes.js", "docs.js"):
        add(f"/{script}", script, "text/javascript")

    @app.get("/samples", include_in_schema=False)
    async def samples() -> list[dict[str, Any]]:
        return [{"name": name, "boxes": sample.boxes} for name, sample in service.samples.items()]

    @app.get("/samples/{name}", include_in_schema=False)
    async def sample(name: str) -> Response:
        if name not in service.samples:
            raise Problem("not-found", f"{name}: no such sample; /samples lists them.")
        return Response(service.samples[name].data, media_type=service.samples[name].media_type)
