"""The endpoint: one Ray Serve deployment that decodes, crops, batches people and answers.

    request -> pictures and boxes (schemas) -> crops -> batch over all requests -> PosePredictor -> answer

A batch is formed of people, not of requests: each request hands in its crops, in portions that fit a
batch, and gets its own rows back. Decoding runs in a few threads, the network in one of its own, so the
event loop always answers /livez and /readyz.

The model comes with Serve's user_config (ModelChoice): a changed one is loaded beside the old and takes
its place once it has passed its self-test; one that fails leaves the old in place and says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import mimetypes
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from ray import serve
from ray.serve.metrics import Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrnet_core.errors import CheckpointError, ConfigError, ImageError, PoseError
from serve.schemas import (
    ImageInfo,
    Limits,
    LoadedModel,
    ModelChoice,
    ModelInfo,
    ModelsAnswer,
    Person,
    Picture,
    PosesAnswer,
    Problem,
    ProblemAnswer,
    Result,
    ServeArgs,
    read_boxes,
    read_pictures,
)

if TYPE_CHECKING:
    from hrnet_core.predictor import PosePredictor

logger = logging.getLogger("ray.serve")  # Serve writes it to the replica's log, with the request id
DECODING_THREADS = 4
MAX_SAMPLES = 24
# After the work ends, requests that were already sent get this long for their answer.
GRACE_S = 10
PAGE = Path(__file__).parent
Threshold = Annotated[float, Query(ge=0, le=1)]


def build(args: ServeArgs | dict[str, Any]) -> serve.Application:
    """The Serve application (`serve.app:build` in a Serve config file, `args:` as in ServeArgs)."""
    args = ServeArgs.model_validate(args)
    choice = ModelChoice(**args.model_dump(include=set(ModelChoice.model_fields)))
    scale: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": args.num_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": max(1, args.max_requests // 4),
            }
        }
    deployment = serve.deployment(
        serve.ingress()(PoseService),
        name="poses",
        user_config=choice.model_dump(),
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        # Our 429 must come first: it is problem+json. Serve's own queue only guards against a flood.
        max_ongoing_requests=2 * args.max_requests + 16,
        max_queued_requests=16 * args.max_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        # A checkpoint does not get better by loading it twenty times.
        max_constructor_retry_count=1,
        # Old replicas go on until their successors are ready.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.deadline_s + GRACE_S,
        health_check_timeout_s=args.deadline_s + GRACE_S,
        **scale,
    )
    return deployment.bind(args)


# --- the model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. Requests hold on to the one they started with."""

    predictor: PosePredictor
    choice: ModelChoice
    flip_test: bool

    def info(self) -> ModelInfo:
        return ModelInfo(
            name=self.choice.name,
            version=self.choice.version,
            sha256=self.predictor.spec.weights_sha256 or "",
            mode=self.predictor.mode,
            flip_test=self.flip_test,
        )

    def described(self) -> LoadedModel:
        spec = self.predictor.spec
        return LoadedModel(
            **self.info().model_dump(),
            source=self.choice.source or self.choice.checkpoint,
            checkpoint=self.choice.checkpoint,
            input_size=spec.input_size,
            codec=spec.codec.as_dict(),
            skeleton={**spec.skeleton.as_dict(), "palette": [list(c) for c in spec.skeleton.palette]},
            provenance=spec.provenance,
        )


def load_model(choice: ModelChoice, args: ServeArgs) -> Model:
    """Fetch, check, load and warm up a checkpoint. CheckpointError says what is wrong with it."""
    from hrnet_core.checkpoint import verify_checkpoint
    from hrnet_core.predictor import PosePredictor

    with tempfile.TemporaryDirectory(prefix="hrnet-checkpoint-") as temporary:
        folder = fetch(choice.checkpoint, Path(temporary))
        verify_checkpoint(folder)
        threads = args.threads or max(1, int(args.num_cpus))
        predictor = PosePredictor.load(folder, device=args.device, mode=args.mode, threads=threads)
    predictor.warm_up()
    flip_test = predictor.spec.flip_test if args.flip_test is None else args.flip_test
    return Model(predictor, choice, flip_test)


def fetch(uri: str, into: Path) -> Path:
    """A local folder for a folder or a URI; what lies elsewhere is copied into `into`.

    CheckpointError where nothing can be read there.
    """
    if "://" not in uri:
        return Path(uri)
    from pyarrow import fs

    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        if not filesystem.get_file_info(fs.FileSelector(path)):
            raise FileNotFoundError(f"nothing under {path}")
        into.mkdir(parents=True, exist_ok=True)
        fs.copy_files(path, str(into), source_filesystem=filesystem)
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise CheckpointError(
            f"{uri}: cannot be read ({error}). Name a folder that every node sees, or a URI that pyarrow "
            f"reads (file://, s3://, gs://, hdfs://), with its credentials in the environment."
        ) from None
    return into


# --- the service -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crops:
    """People on their way into a batch."""

    model: Model
    crops: NDArray[np.uint8]
    """(P, h, w, 3)"""


@dataclass(frozen=True)
class Found:
    """What came back for them."""

    keypoints: NDArray[np.float32]
    """(P, K, 2) crop px"""
    scores: NDArray[np.float32]
    """(P, K)"""
    started: float
    ended: float


@dataclass(frozen=True)
class Prepared:
    """A decoded picture, cut up for its model."""

    model: Model
    info: ImageInfo
    source: str
    boxes_xywh: NDArray[np.float32]
    crops: NDArray[np.uint8]
    image_to_crop: NDArray[np.float64]
    image: NDArray[np.uint8] | None
    """Kept only where it will be drawn on."""


def count_people(items: list[Crops]) -> int:
    """Size of a batch, for @serve.batch."""
    return sum(len(item.crops) for item in items)


class PoseService:
    """The deployment. One instance is one replica."""

    def __init__(self, args: ServeArgs) -> None:
        self.args = args
        self.model: Model | None = None
        self.load_error: str | None = None
        self.samples = load_samples(args.samples) if args.samples else {}
        self.metrics = Metrics()
        self.in_progress = 0
        self._seconds = 1.0  # moving average of a request, for Retry-After
        self._last_success = -math.inf
        # @serve.batch closes a batch when its wait is over, even while the model is busy: requests that
        # come one by one would queue up as batches of one. They wait here until the model is idle.
        self._idle = asyncio.Event()
        self._idle.set()
        self._decoding = ThreadPoolExecutor(DECODING_THREADS, "decode")
        self._inference = ThreadPoolExecutor(1, "infer")
        self._batched.set_max_batch_size(args.max_batch_people)
        self._batched.set_batch_wait_timeout_s(args.batch_wait_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self)

    # Serve calls this at the start and whenever user_config changes.
    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        choice = ModelChoice(**user_config)
        if self.model is not None and choice == self.model.choice:
            return
        loop = asyncio.get_running_loop()
        try:
            model = await loop.run_in_executor(None, load_model, choice, self.args)
        except Exception as error:
            self.load_error = (
                str(error) if isinstance(error, PoseError) else f"{choice.checkpoint}: {error!r}"
            )
            if self.model is None:
                raise  # a replica without a model must not start; Serve keeps the old ones, if any
            logger.error("keeping %s: %s", self.model.choice.version, self.load_error)
            return
        self.model, self.load_error = model, None
        version, mode = choice.version or "a checkpoint", model.predictor.mode
        logger.info("serving %s from %s, mode %s", version, choice.checkpoint, mode)

    async def check_health(self) -> None:
        """One crop through the network, unless requests have just shown that it works."""
        model = self.ready()
        if time.monotonic() - self._last_success < 10:
            return
        width, height = model.predictor.spec.input_size
        (found,) = await self._infer([Crops(model, np.zeros((1, height, width, 3), np.uint8))])
        if isinstance(found, Exception):
            raise found

    def ready(self) -> Model:
        """The model that answers. Problem (503) where there is none."""
        if self.model is None:
            raise Problem("not-ready", self.load_error or "the model is still being loaded.")
        return self.model

    async def answer(self, request: Request, draw: bool = False) -> tuple[PosesAnswer, list[Prepared]]:
        """Everything between a request and its answer. Problem says why there is none.

        The second value holds the decoded pictures where `draw` asks for them.
        """
        model = self.ready()
        if self.in_progress >= self.args.max_requests:
            raise Problem(
                "overloaded",
                f"{self.in_progress} requests are in progress here, as many as are taken. Try again later.",
                headers={"Retry-After": str(math.ceil(self._seconds))},
            )
        self.in_progress += 1
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.args.deadline_s):
                return await self._answer(model, request, draw)
        except TimeoutError:
            raise Problem(
                "deadline",
                f"no answer within {self.args.deadline_s:g} s. Send fewer people or smaller pictures, or "
                f"try again when there is less to do.",
            ) from None
        finally:
            self.in_progress -= 1
            self._seconds += 0.1 * (time.perf_counter() - started - self._seconds)

    async def _answer(self, model: Model, request: Request, draw: bool) -> tuple[PosesAnswer, list[Prepared]]:
        clock = [time.perf_counter()]
        pictures = await read_pictures(request, self.args.limits)
        if draw and len(pictures) > 1:
            raise Problem("too-many-images", "image: an overlay is of one picture.", field="image", limit=1)
        clock.append(time.perf_counter())
        loop = asyncio.get_running_loop()
        prepared = await asyncio.gather(
            *(
                loop.run_in_executor(self._decoding, prepare, model, p, self.args.limits, draw)
                for p in pictures
            )
        )
        clock.append(time.perf_counter())
        found = await self._find(model, np.concatenate([p.crops for p in prepared]))
        clock += [found.started, found.ended]
        results = place(prepared, found)
        ended = time.perf_counter()
        stages = dict(zip(("read", "decode", "queue", "infer"), np.diff(clock), strict=True))
        self.metrics.answered(sum(len(r.persons) for r in results), stages)
        timings = {name: round(1000 * seconds, 2) for name, seconds in stages.items()}
        answer = PosesAnswer(
            request_id=request.state.request_id,
            model=model.info(),
            results=results,
            timings_ms={**timings, "total": round(1000 * (ended - clock[0]), 2)},
        )
        return answer, list(prepared)

    async def _find(self, model: Model, crops: NDArray[np.uint8]) -> Found:
        """Keypoints of a request's people: in portions that fit a batch, each beside other requests'."""
        if len(crops) == 0:
            now, keypoints = time.perf_counter(), model.predictor.spec.skeleton.num_keypoints
            return Found(
                np.zeros((0, keypoints, 2), np.float32), np.zeros((0, keypoints), np.float32), now, now
            )
        size = self.args.max_batch_people
        portions = [Crops(model, crops[i : i + size]) for i in range(0, len(crops), size)]
        parts = await asyncio.gather(*(self._portion(portion) for portion in portions))
        return Found(
            np.concatenate([part.keypoints for part in parts]),
            np.concatenate([part.scores for part in parts]),
            min(part.started for part in parts),
            max(part.ended for part in parts),
        )

    async def _portion(self, portion: Crops) -> Found:
        await self._idle.wait()
        found = await self._batched(portion)
        if isinstance(found, Exception):
            raise found
        return found

    @serve.batch(batch_size_fn=count_people)
    async def _batched(self, items: list[Crops]) -> list[Found | Exception]:
        self.metrics.batch_people.observe(count_people(items))
        self._idle.clear()
        try:
            return await self._infer(items)
        finally:
            self._idle.set()

    async def _infer(self, items: list[Crops]) -> list[Found | Exception]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._inference, infer, items, self.args.max_batch_people)
        if any(isinstance(one, Found) for one in found):
            self._last_success = time.monotonic()
        return found


def prepare(model: Model, picture: Picture, limits: Limits, keep: bool) -> Prepared:
    """Decode a picture as displayed and cut its people out. Problem names the field that is wrong."""
    from hrnet_core.geometry import crop_people
    from hrnet_core.images import check_image, decode_checked

    try:
        header = check_image(picture.data, limits.max_pixels)
        if header.frames > 1 and not limits.first_frame:
            raise Problem(
                "several-frames",
                f"{picture.field}: the {header.format} file holds several frames or pages, and which one is "
                f"meant is not said. Send one picture.",
                field=picture.field,
            )
        image = decode_checked(picture.data, header, apply_exif=True)
    except ImageError as error:
        slug = {"too_large": "too-many-pixels", "truncated": "truncated-picture"}.get(
            error.reason, "not-a-picture"
        )
        raise Problem(slug, f"{picture.field}: {error}", field=picture.field, reason=error.reason) from None
    height, width = image.shape[:2]
    boxes = picture.boxes_xywh
    if boxes is None:
        boxes = np.array([[0, 0, width, height]], np.float32)
    _refuse_outside(boxes, width, height, picture.field)
    image_to_crop = model.predictor.image_to_crop(boxes)
    return Prepared(
        model,
        ImageInfo(width=width, height=height, exif_rotated=header.orientation != 1),
        "whole_image" if picture.boxes_xywh is None else "request",
        boxes,
        crop_people(image, image_to_crop, model.predictor.spec.input_size),
        image_to_crop,
        image if keep else None,
    )


def _refuse_outside(boxes_xywh: NDArray[np.float32], width: int, height: int, image_field: str) -> None:
    x, y, w, h = boxes_xywh.T
    outside = np.flatnonzero((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    if len(outside):
        field = f"{image_field.replace('image', 'boxes')}[{outside[0]}]"
        raise Problem(
            "invalid-boxes",
            f"{field}: lies outside of the picture, which is displayed as {width} x {height} px.",
            field=field,
        )


def infer(items: list[Crops], batch_size: int) -> list[Found | Exception]:
    """A batch through the network: a result for each item, in order.

    Items of different models (while one takes the other's place) run one model after the other. Where a
    batch fails, its items are tried one by one, so that an item fails for its own sake only.
    """
    models = list({id(item.model): item.model for item in items}.values())
    if len(models) > 1:
        apart = {id(m): iter(infer([i for i in items if i.model is m], batch_size)) for m in models}
        return [next(apart[id(item.model)]) for item in items]
    started = time.perf_counter()
    try:
        keypoints, scores = models[0].predictor.predict_crops(
            np.concatenate([item.crops for item in items]),
            flip_test=models[0].flip_test,
            batch_size=batch_size,
        )
        if not (np.isfinite(keypoints).all() and np.isfinite(scores).all()):
            raise RuntimeError("the network returned numbers that are not finite")
    except Exception as error:
        if len(items) == 1:
            return [error]
        return [infer([item], batch_size)[0] for item in items]
    ended = time.perf_counter()
    cuts = np.cumsum([len(item.crops) for item in items])[:-1]
    return [
        Found(k, s, started, ended)
        for k, s in zip(np.split(keypoints, cuts), np.split(scores, cuts), strict=True)
    ]


def place(pictures: list[Prepared], found: Found) -> list[Result]:
    """Keypoints from crops into their pictures, as answers. Rounded to 1e-4: far below what is measured."""
    from hrnet_core.geometry import place_in_image
    from hrnet_core.oks import rescore

    cuts = np.cumsum([len(p.crops) for p in pictures])[:-1]
    results = []
    for picture, keypoints, scores in zip(
        pictures, np.split(found.keypoints, cuts), np.split(found.scores, cuts), strict=True
    ):
        points = np.dstack([place_in_image(keypoints, picture.image_to_crop), scores]).astype(np.float64)
        person_scores = rescore(scores, np.ones(len(scores)))
        persons = [
            Person(bbox=box, score=score, keypoints=person)
            for box, score, person in zip(
                picture.boxes_xywh.tolist(),
                person_scores.round(4).tolist(),
                points.round(4).tolist(),
                strict=True,
            )
        ]
        results.append(Result(image=picture.info, boxes_source=picture.source, persons=persons))
    return results


# --- samples of the page -----------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    data: bytes
    media_type: str
    boxes: list[list[float]] | None


def load_samples(uri: str) -> dict[str, Sample]:
    """Pictures named in boxes.json ({"picture.jpg": [[x, y, w, h], ...]}), in its order.

    ConfigError where the folder does not hold what it names.
    """
    with tempfile.TemporaryDirectory(prefix="hrnet-samples-") as temporary:
        folder = fetch(uri, Path(temporary))
        try:
            boxes = json.loads((folder / "boxes.json").read_text())
            if not isinstance(boxes, dict):
                raise ValueError("not a JSON object")
            names = list(boxes)[:MAX_SAMPLES]
            if any(Path(name).name != name for name in names):
                raise ValueError("a name in it is a path, not a file of the folder")
            for name in names:
                read_boxes(boxes[name], name)
            return {
                name: Sample(
                    (folder / name).read_bytes(),
                    mimetypes.guess_type(name)[0] or "application/octet-stream",
                    boxes[name],
                )
                for name in names
            }
        except (OSError, ValueError, Problem) as error:
            raise ConfigError(
                f"{uri}/boxes.json: {error}. A samples folder holds pictures and a boxes.json with "
                f'{{"picture.jpg": [[x, y, w, h], ...]}}.'
            ) from None


# --- HTTP --------------------------------------------------------------------------------------


class Metrics:
    """Prometheus series of a replica, exported by Ray on each node's metrics port with a ray_ prefix."""

    def __init__(self) -> None:
        self.requests = Counter(
            "hrnet_requests", description="Requests answered.", tag_keys=("path", "status")
        )
        self.people = Counter("hrnet_people", description="People whose keypoints were found.")
        self.stage_seconds = Histogram(
            "hrnet_stage_seconds",
            description="Seconds of a request by stage: read, decode, queue, infer.",
            boundaries=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30],
            tag_keys=("stage",),
        )
        self.batch_people = Histogram(
            "hrnet_batch_people",
            description="People of a forward pass.",
            boundaries=[1, 2, 4, 8, 16, 32, 64, 128, 256],
        )

    def answered(self, people: int, stages: dict[str, float]) -> None:
        if people:
            self.people.inc(people)
        for stage, seconds in stages.items():
            self.stage_seconds.observe(max(float(seconds), 1e-6), tags={"stage": stage})


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
                self.metrics.requests.inc(tags={"path": _counted_path(scope), "status": str(status)})
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            logger.exception("request %s failed", request.state.request_id)
            if status:
                raise  # too late to answer anything else
            problem = Problem(
                "internal-error",
                "this is a defect here, not in the request. The log has the details under the request id.",
            )
            await _as_response(request, problem)(scope, receive, counted)


def _counted_path(scope: Scope) -> str:
    """The route's own path: a series for each path that a stranger invents would have no end."""
    route = scope.get("route")
    return getattr(route, "path", "other")


def _as_response(request: Request, problem: Problem) -> Response:
    return JSONResponse(
        problem.body(request.url.path, request.state.request_id),
        problem.status,
        headers=problem.headers,
        media_type="application/problem+json",
    )


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _as_response(request, error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    slugs = {404: "not-found", 405: "method-not-allowed"}
    details = {
        404: f"{request.url.path}: see /docs for what there is.",
        405: f"{request.method} {request.url.path}: see /docs for what there is.",
    }
    slug = slugs.get(error.status_code, "malformed-body")
    detail = details.get(error.status_code, str(error.detail))
    return _as_response(request, Problem(slug, detail, headers=dict(error.headers or {})))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return _as_response(request, Problem("invalid-field", f"{field}: {first['msg']}.", field=field))


REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "One or more pictures (JPEG, PNG and what else is read).",
                    },
                    "boxes": {
                        "type": "string",
                        "description": "JSON [[x, y, w, h], ...] in px of the displayed picture, a person a "
                        "box. Several pictures: a list of such lists, null for a whole picture.",
                    },
                },
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "additionalProperties": False,
                "properties": {
                    "image": {
                        "anyOf": [
                            {"type": "string", "format": "byte"},
                            {"type": "array", "items": {"type": "string", "format": "byte"}},
                        ]
                    },
                    "boxes": {
                        "description": "As in the form, not quoted.",
                        "type": ["array", "null"],
                        "items": {"type": ["array", "null"]},
                    },
                },
            }
        },
    },
}


def make_app(service: PoseService) -> FastAPI:
    """The HTTP side of a service."""
    app = FastAPI(
        title="hrnet pose",
        version="1",
        description="Keypoints of people in photographs. Errors are RFC 9457 problem+json.",
        docs_url=None,  # FastAPI's loads its scripts from elsewhere; ours is docs.html
        redoc_url=None,
        responses={
            "default": {
                "description": "A problem.",
                "content": {"application/problem+json": {"schema": ProblemAnswer.model_json_schema()}},
            }
        },
    )
    app.add_middleware(Envelope, metrics=service.metrics)
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
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
        answer, (picture,) = await service.answer(request, draw=True)
        png = await asyncio.to_thread(_draw, picture, answer.results[0], threshold)
        return Response(png, media_type="image/png", headers={"X-Model-Version": answer.model.version})


def _draw(picture: Prepared, result: Result, threshold: float) -> bytes:
    from hrnet_core.drawing import draw_poses
    from hrnet_core.images import encode_png

    skeleton = picture.model.predictor.spec.skeleton
    points = np.array([p.keypoints for p in result.persons], np.float32)
    points = points.reshape(-1, skeleton.num_keypoints, 3)
    drawn = draw_poses(
        picture.image, points[..., :2], points[..., 2], skeleton, threshold, boxes_xywh=picture.boxes_xywh
    )
    return encode_png(drawn)


def _add_state(app: FastAPI, service: PoseService) -> None:
    @app.get("/v1/models", response_model=ModelsAnswer)
    async def models() -> ModelsAnswer:
        """The model that answers, as it was loaded."""
        loaded = [service.model.described()] if service.model else []
        return ModelsAnswer(models=loaded, last_load_error=service.load_error)

    @app.get("/livez")
    async def livez() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """A model is loaded; 503 with the reason where none is."""
        model = service.ready()
        return {"ready": True, "model": model.info(), "last_load_error": service.load_error}


def _add_page(app: FastAPI, service: PoseService) -> None:
    # Nothing of the page comes from elsewhere, and nothing else may run in it.
    policy = {"Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:"}

    def add(path: str, file: str, media_type: str) -> None:
        content = (PAGE / file).read_bytes()

        @app.get(path, include_in_schema=False)
        async def static() -> Response:
            return Response(content, media_type=media_type, headers=policy)

    add("/", "page.html", "text/html; charset=utf-8")
    add("/page.css", "page.css", "text/css; charset=utf-8")
    add("/page.js", "page.js", "text/javascript; charset=utf-8")
    add("/docs", "docs.html", "text/html; charset=utf-8")
    add("/docs.js", "docs.js", "text/javascript; charset=utf-8")

    @app.get("/samples", include_in_schema=False)
    async def samples() -> list[dict[str, Any]]:
        return [{"name": name, "boxes": sample.boxes} for name, sample in service.samples.items()]

    @app.get("/samples/{name}", include_in_schema=False)
    async def sample(name: str) -> Response:
        if name not in service.samples:
            raise Problem("not-found", f"{name}: no such sample; /samples lists them.")
        return Response(service.samples[name].data, media_type=service.samples[name].media_type)
