"""A replica: the model it holds, requests through the stages read, decode, queue and infer, its health.

The HTTP side (routes.py) is handed in, so that it may know the service and not the other way round.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from ray import serve
from ray.serve.metrics import Counter, Histogram

from hrnet_core.errors import PoseError
from hrnet_core.results import Poses
from serve.body import read_uploads
from serve.model import ModelGauges, ServedModel, load_model, named
from serve.samples import load_samples
from serve.schemas import ModelsAnswer, PosesAnswer, Problem
from serve.settings import LiveSettings, ModelChoice, ServeArgs
from serve.work import Decoded, Inferred, Portion, count_people, decode, infer, result_of

logger = logging.getLogger("ray.serve")  # Serve writes it to the replica's log, with the request id
DECODING_THREADS = 4
Answered = tuple[PosesAnswer, list[tuple[Decoded, Poses]]]
"""The answer to a request, and of each of its pictures what it was made of."""


class PoseService:
    """The deployment. One instance is one replica."""

    def __init__(self, args: ServeArgs, make_app: Callable[[PoseService], FastAPI]) -> None:
        self.args = args
        self._make_app = make_app
        self.live: LiveSettings | None = None  # what is to be served
        self.model: ServedModel | None = None  # what is
        self.load_error: str | None = None  # why they differ
        self._settled: LiveSettings | None = None  # what was tried last, once it has ended
        self._loading = asyncio.Lock()
        self._switching: asyncio.Task[None] | None = None
        self.samples = load_samples(args.samples) if args.samples else {}
        self.metrics = Metrics()
        self.gauges = ModelGauges()
        self.in_progress = 0
        self._seconds = 1.0  # moving average of a request, for Retry-After
        self._last_success = -math.inf
        # @serve.batch closes a batch when its wait is over, even while the model is busy: requests that
        # come one by one would queue up as batches of one. They wait here until the model is idle.
        self._idle = asyncio.Event()
        self._idle.set()
        self._decoding = ThreadPoolExecutor(DECODING_THREADS, "decode")
        self._inference = ThreadPoolExecutor(1, "infer")
        self._infer_batched.set_max_batch_size(args.max_batch_people)
        self._infer_batched.set_batch_wait_timeout_s(args.batch_wait_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._make_app(self)

    # Serve calls this at the start and whenever user_config changes. It sends a replica no requests until
    # this returns: where a model answers already, the new one is loaded beside it and later.
    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.live = LiveSettings(**user_config)
        if self.model is None:
            await self._first_model(self.live)
        else:
            self._switching = asyncio.create_task(self._switch())

    async def _first_model(self, live: LiveSettings) -> None:
        """The model asked for, else the one before it; a replica without a model must not start."""
        try:
            self.model = await self._load(live.choice())
        except Exception as error:
            self.load_error = _reason(live, error)
            if live.previous is None:
                raise
            logger.error("%s Going back to %s.", self.load_error, live.previous.version)
            self.model = await self._load(live.previous)
        self._settle(live)

    async def _switch(self) -> None:
        async with self._loading:  # one after the other: the last one stays
            live, model = self.live, self.model
            assert live
            assert model
            try:
                if live.choice() != model.choice:
                    self.model = await self._load(live.choice())
                self.load_error = None
            except Exception as error:
                self.load_error = _reason(live, error)
                logger.error("keeping %s: %s", model.choice.version, self.load_error)
            self._settle(live)

    def _settle(self, live: LiveSettings) -> None:
        self._settled = live
        self.gauges.show(live, self.model, failed=self.failure is not None)

    @property
    def failure(self) -> str | None:
        """Why the model asked for last does not answer, or why its deploy was taken back."""
        return self.load_error or (self.live.last_failure if self.live else "") or None

    async def _load(self, choice: ModelChoice) -> ServedModel:
        model = await asyncio.to_thread(load_model, choice, self.args)
        version, mode = choice.version or "a checkpoint", model.predictor.mode
        logger.info("serving %s from %s, mode %s", version, choice.checkpoint, mode)
        return model

    async def state(self) -> dict[str, Any]:
        """Of this replica, for whoever deploys: what is to be live, whether that was tried, how it ended, and
        how many requests are in progress."""
        assert self.live
        intended = self.args.model_copy(update=dict(self.live))
        return {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "intended": intended.model_dump(mode="json"),
            "settled": self._settled == self.live,
            "serving": self.model.choice.model_dump() if self.model else None,
            "load_error": self.load_error,
            "in_progress": self.in_progress,
        }

    def models(self) -> ModelsAnswer:
        """Intent, truth and the last failure."""
        live = self.live
        return ModelsAnswer(
            models=[self.model.described()] if self.model else [],
            intended=named(live) if live else None,
            previous=named(live.previous) if live and live.previous else None,
            last_load_error=self.failure,
        )

    async def check_health(self) -> None:
        """One crop through the network, unless requests have just shown that it works."""
        if (model := self.model) is None:
            raise RuntimeError(self.load_error or "no model")
        if time.monotonic() - self._last_success < 10:
            return
        width, height = model.predictor.spec.input_size
        (inferred,) = await self._infer([Portion(model, np.zeros((1, height, width, 3), np.uint8))])
        if isinstance(inferred, Exception):
            raise inferred

    def ready(self) -> ServedModel:
        """The model that answers. Problem (503) where there is none, or no request is taken any more."""
        if self.model is None:
            raise Problem("not-ready", self.load_error or "the model is still being loaded.")
        if self.live and self.live.draining:
            what = "the endpoint is about to end: requests in progress get their answers, new ones do not."
            raise Problem("draining", what, headers={"Retry-After": "5"})
        return self.model

    async def answer(self, request: Request, draw: bool = False) -> Answered:
        """Everything between a request and its answer. Problem says why there is none.

        draw: for an overlay: the request is of one picture, whose pixels are kept.
        """
        model = self.ready()
        if self.in_progress >= self.args.max_requests:
            what = f"{self.in_progress} requests are in progress here, as many as are taken. Try again later."
            raise Problem("overloaded", what, headers={"Retry-After": str(math.ceil(self._seconds))})
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

    async def _answer(self, model: ServedModel, request: Request, draw: bool) -> Answered:
        clock = [time.perf_counter()]
        uploads = await read_uploads(request, self.args.limits)
        if draw and len(uploads) > 1:
            raise Problem.of_field("image", "too-many-images", "an overlay is of one picture.", limit=1)
        clock.append(time.perf_counter())
        loop, pool, limits = asyncio.get_running_loop(), self._decoding, self.args.limits
        decoded = await asyncio.gather(
            *(loop.run_in_executor(pool, decode, model, upload, limits, draw) for upload in uploads)
        )
        people = [one.people for one in decoded]
        clock.append(time.perf_counter())
        inferred = await self._infer_people(model, np.concatenate([one.crops for one in people]))
        clock += [inferred.started, inferred.ended]
        poses = model.predictor.finish(people, inferred.keypoints, inferred.scores)
        pictures = list(zip(decoded, poses, strict=True))
        results = [result_of(*picture) for picture in pictures]
        ended = time.perf_counter()
        stages = dict(zip(("read", "decode", "queue", "infer"), np.diff(clock), strict=True))
        self.metrics.answered(sum(len(r.persons) for r in results), stages)
        seconds = {**stages, "total": ended - clock[0]}
        timings = {name: round(1000 * spent, 2) for name, spent in seconds.items()}
        request_id = request.state.request_id
        answer = PosesAnswer(request_id=request_id, model=model.info(), results=results, timings_ms=timings)
        return answer, pictures

    async def _infer_people(self, model: ServedModel, crops: NDArray[np.uint8]) -> Inferred:
        """A request's people: in portions that fit a batch, each beside other requests'."""
        size = self.args.max_batch_people
        portions = [Portion(model, crops[i : i + size]) for i in range(0, len(crops), size)]
        parts = await asyncio.gather(*(self._infer_portion(portion) for portion in portions))
        if not parts:  # nobody is asked for: no batch, no wait
            parts = infer([Portion(model, crops)], size)
        return Inferred(
            np.concatenate([part.keypoints for part in parts]),
            np.concatenate([part.scores for part in parts]),
            min(part.started for part in parts),
            max(part.ended for part in parts),
        )

    async def _infer_portion(self, portion: Portion) -> Inferred:
        await self._idle.wait()
        inferred = await self._infer_batched(portion)
        if isinstance(inferred, Exception):
            raise inferred
        return inferred

    @serve.batch(batch_size_fn=count_people)
    async def _infer_batched(self, portions: list[Portion]) -> list[Inferred | Exception]:
        self.metrics.batch_people.observe(count_people(portions))
        self._idle.clear()
        try:
            return await self._infer(portions)
        finally:
            self._idle.set()

    async def _infer(self, portions: list[Portion]) -> list[Inferred | Exception]:
        loop = asyncio.get_running_loop()
        inferred = await loop.run_in_executor(self._inference, infer, portions, self.args.max_batch_people)
        if any(isinstance(one, Inferred) for one in inferred):
            self._last_success = time.monotonic()
        return inferred


def _reason(live: LiveSettings, error: Exception) -> str:
    """Why a model is not served: ours say it in a sentence, others with their type."""
    return str(error) if isinstance(error, PoseError) else f"{live.checkpoint}: {error!r}"


class Metrics:
    """Prometheus series of a replica, exported by Ray on each node's metrics port with a ray_ prefix."""

    def __init__(self) -> None:
        self.requests = Counter("hrnet_requests", "Requests answered.", ("path", "status"))
        self.people = Counter("hrnet_people", "People whose keypoints were found.")
        stages = "Seconds of a request by stage: read, decode, queue, infer."
        bounds = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
        self.stage_seconds = Histogram("hrnet_stage_seconds", stages, bounds, ("stage",))
        people = [1, 2, 4, 8, 16, 32, 64, 128, 256]
        self.batch_people = Histogram("hrnet_batch_people", "People of a forward pass.", people)

    def answered(self, people: int, stages: dict[str, float]) -> None:
        if people:
            self.people.inc(people)
        for stage, seconds in stages.items():
            self.stage_seconds.observe(max(float(seconds), 1e-6), tags={"stage": stage})
