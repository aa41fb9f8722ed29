"""A replica: the model it holds, requests through the stages read, decode, queue and infer, its health.

The HTTP side (routes.py) is handed in, so that it may know the service and not the other way round.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from ray import serve

from hrnet_core import memory
from hrnet_core.errors import PoseError
from hrnet_core.results import Poses
from serve.body import FORM_TYPE, JSON_TYPE, Upload, read_body, uploads_of
from serve.detector import Find, search_of
from serve.keys import Key, Keys
from serve.metrics import Metrics
from serve.model import ModelGauges, ServedModel, load_model, named
from serve.pictures import Pictures
from serve.room import Room
from serve.samples import load_samples
from serve.schemas import ModelsAnswer, PosesAnswer, Problem
from serve.settings import Limits, LiveSettings, ModelChoice, ServeArgs
from serve.traces import Traces, spans_of
from serve.traces import cannot as cannot_trace
from serve.work import Inferred, Portion, count_people, infer, result_of

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

logger = logging.getLogger("ray.serve")  # Serve writes it to the replica's log, with the request id
Drawing = Callable[[NDArray[np.uint8], Poses], bytes]
"""From a picture and its poses to a file."""


@dataclass(frozen=True)
class Protocol:
    """How a request says its pictures and boxes."""

    types: tuple[str, ...]
    """Media types that are read; () for any."""
    uploads_of: Callable[[Request, bytes, Limits], Awaitable[list[Upload]]]


OURS = Protocol((FORM_TYPE, JSON_TYPE), uploads_of)


@dataclass(frozen=True)
class Answered:
    """The answer to a request, and what it is made of."""

    answer: PosesAnswer
    poses: list[Poses]
    """One for each picture."""
    file: bytes | None
    """What was drawn, where that was asked for."""


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
        self.room = Room(args)
        self.keys = Keys(args.keys, args.need_keys)
        self.traces = Traces(args.traces)
        if why := cannot_trace(args.traces):
            logger.warning("no traces are sent: %s.", why)
        self.gauges = ModelGauges()
        self._last_success = -math.inf
        # @serve.batch closes a batch when its wait is over, even while the model is busy: requests that
        # come one by one would queue up as batches of one. They wait here until the model is idle.
        self._idle = asyncio.Event()
        self._idle.set()
        self._portions = 0  # that wait for the model or are in it
        self.pictures = Pictures(args, self.room, self.metrics.detected)
        self._inference = ThreadPoolExecutor(1, "infer")
        # Ray's types do not have what @serve.batch adds.
        self._infer_batched.set_max_batch_size(args.max_batch_people)  # type: ignore[attr-defined]
        self._infer_batched.set_batch_wait_timeout_s(args.batch_wait_s)  # type: ignore[attr-defined]
        memory.collect_as_usual()  # before a model is there: models come and go

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
        if self.model:
            self.metrics.drift.watch(self.model.choice)
        self._show_model(live)

    def _show_model(self, live: LiveSettings) -> None:
        self.gauges.show(live, self.model, failed=self.failure is not None)

    @property
    def failure(self) -> str | None:
        """Why the model asked for last does not answer, or why its deploy was taken back."""
        return self.load_error or (self.live.last_failure if self.live else "") or None

    async def _load(self, choice: ModelChoice) -> ServedModel:
        model = await asyncio.to_thread(load_model, choice, self.args, self.model)
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
            "in_progress": self.room.in_progress + self.room.bodies,
        }

    def models(self) -> ModelsAnswer:
        """Intent, truth and the last failure."""
        live = self.live
        return ModelsAnswer(
            models=[self.model.described(self.args)] if self.model else [],
            intended=named(live) if live else None,
            previous=named(live.previous) if live and live.previous else None,
            last_load_error=self.failure,
        )

    def __del__(self) -> None:
        """Serve's last call to a replica that ends: the last seconds' traces are still here."""
        if traces := getattr(self, "traces", None):
            traces.close()

    async def check_health(self) -> None:
        """One crop through the network, unless requests have just shown that it works. Every ten seconds."""
        self.metrics.show(self.room, at_once=True)
        if self.live:
            self._show_model(self.live)
        for handler in logger.handlers:  # Serve writes its log in blocks, of which a quiet day fills none
            handler.flush()
        if (model := self.model) is None:
            raise RuntimeError(self.load_error or "no model")
        if time.monotonic() - self._last_success < 10:
            return
        width, height = model.predictor.spec.input_size
        (inferred,) = await self._infer([Portion(model, np.zeros((1, height, width, 3), np.uint8))])
        if isinstance(inferred, Exception):
            raise inferred

    def admit(self, request: Request) -> Key | None:
        """Whose request it is; None where no key is asked for. Problem (401) for one without a known key."""
        if not self.keys.wanted:
            return None
        key = self.keys.holder(request.headers.get("authorization"))
        if key is None:
            what = "send the header Authorization: Bearer KEY. Whoever runs this endpoint gives keys."
            raise Problem("unauthorized", what, headers={"WWW-Authenticate": 'Bearer realm="hrnet"'})
        request.state.key = key.name
        return key

    def ready(self) -> ServedModel:
        """The model that answers. Problem (503) where there is none, or no request is taken any more."""
        if self.model is None:
            raise Problem("not-ready", self.load_error or "the model is still being loaded.")
        if self.live and self.live.draining:
            what = "the endpoint is about to end: requests in progress get their answers, new ones do not."
            raise Problem("draining", what, headers={"Retry-After": "5"})
        return self.model

    def expect(self, request: Request) -> tuple[ServedModel, Key | None]:
        """The model that is to answer, and whose request it is. Problem where none answers, the key is not
        known, or nothing more is taken."""
        model = self.ready()
        request.state.model = model.info()
        key = self.admit(request)
        self.room.expect(key)
        return model, key

    async def answer(
        self, request: Request, drawing: Drawing | None = None, protocol: Protocol = OURS
    ) -> Answered:
        """Everything between a request and its answer. Problem says why there is none.

        drawing: for an overlay: the request is of one picture, and the file that this makes of it comes too.
        """
        started, spans = time.perf_counter(), spans_of(request)
        model, key = self.expect(request)
        with self.room.body(key) as grown:
            with self.room.reading(), spans.stage("read"):
                body = await read_body(request, self.args.limits, grown, protocol.types)
            with self.room.place(key):
                try:
                    async with asyncio.timeout(self.args.deadline_s):
                        with spans.stage("parse"):
                            uploads = await protocol.uploads_of(request, body, self.args.limits)
                        with self.room.time_for(sum(one.people for one in uploads)):
                            return await self._answer(model, request, uploads, drawing, started)
                except TimeoutError:
                    raise Problem(
                        "deadline",
                        f"no answer within {self.args.deadline_s:g} s. Send fewer people or smaller "
                        f"pictures, or try again when there is less to do.",
                    ) from None

    async def _answer(
        self,
        model: ServedModel,
        request: Request,
        uploads: list[Upload],
        drawing: Drawing | None,
        started: float,
    ) -> Answered:
        if drawing and len(uploads) > 1:
            raise Problem.of_field("image", "too-many-images", "an overlay is of one picture.", limit=1)
        clock, file, spans = [started, time.perf_counter()], None, spans_of(request)
        search = search_of(getattr(request.state, "find", Find()), uploads, model.detector, self.args)
        async with self.pictures.opened(model, uploads, search, drawing is not None, spans) as decoded:
            people = [one.people for one in decoded]
            clock.append(time.perf_counter())
            crops = np.concatenate([one.crops for one in people])
            inferred = await self._infer_people(model, crops, spans.context)
            clock += [inferred.started, inferred.ended]
            spans.add("queue", clock[2], inferred.started)
            spans.add("infer", inferred.started, inferred.ended, inferred.batches)
            with spans.stage("place"):
                poses = model.predictor.finish(people, inferred.keypoints, inferred.scores)
                results = [result_of(*picture) for picture in zip(decoded, poses, strict=True)]
            if drawing and (image := decoded[0].image) is not None:
                with spans.stage("draw"):
                    file = await asyncio.to_thread(drawing, image, poses[0])
        ended = time.perf_counter()
        read, decoding, queue, infer_s = np.diff(clock).tolist()
        detect = {"detect": search.seconds} if search else {}
        decoding -= sum(detect.values())
        stages = {"read": read, "decode": decoding, **detect, "queue": queue, "infer": infer_s}
        request.state.stages = stages
        pixels = sum(r.image.width * r.image.height for r in results)
        scores = np.concatenate([one.keypoints.conf for one in poses])
        request.state.pictures, request.state.people = len(results), len(scores)
        self.metrics.found(scores, pixels, model.info())
        seconds = {**stages, "total": ended - clock[0]}
        timings = {name: round(1000 * spent, 2) for name, spent in seconds.items()}
        request_id = request.state.request_id
        answer = PosesAnswer(request_id=request_id, model=model.info(), results=results, timings_ms=timings)
        return Answered(answer, poses, file)

    async def _infer_people(
        self, model: ServedModel, crops: NDArray[np.uint8], trace: SpanContext | None
    ) -> Inferred:
        """A request's people: in portions that fit a batch, each beside other requests'."""
        size = self.args.max_batch_people
        portions = [Portion(model, crops[i : i + size], trace) for i in range(0, len(crops), size)]
        parts = await asyncio.gather(*(self._infer_portion(portion) for portion in portions))
        if not parts:  # nobody is asked for: no batch, no wait
            (nobody,) = infer([Portion(model, crops)], size)
            if isinstance(nobody, Exception):
                raise nobody
            return nobody
        return Inferred(
            np.concatenate([part.keypoints for part in parts]),
            np.concatenate([part.scores for part in parts]),
            min(part.started for part in parts),
            max(part.ended for part in parts),
            tuple(batch for part in parts for batch in part.batches),
        )

    async def _infer_portion(self, portion: Portion) -> Inferred:
        alone = not self._portions and self._idle.is_set() and not self.args.batch_wait_s
        self._portions += 1
        try:
            if alone:  # then it needs no batch, and Serve takes half a millisecond to make one of it
                (inferred,) = await self._infer_together([portion])
            else:
                await self._idle.wait()
                inferred = await self._infer_batched(portion)
        finally:
            self._portions -= 1
        if isinstance(inferred, Exception):
            raise inferred
        return inferred

    @serve.batch(batch_size_fn=count_people)
    async def _infer_batched(self, portions: list[Portion]) -> list[Inferred | Exception]:
        return await self._infer_together(portions)

    async def _infer_together(self, portions: list[Portion]) -> list[Inferred | Exception]:
        self.metrics.batches.observe(count_people(portions))
        self._idle.clear()
        try:
            return await self._infer(portions)
        finally:
            self._idle.set()

    async def _infer(self, portions: list[Portion]) -> list[Inferred | Exception]:
        loop, size = asyncio.get_running_loop(), self.args.max_batch_people
        with self.traces.batch([one.trace for one in portions], count_people(portions)) as batch:
            inferred = await loop.run_in_executor(self._inference, infer, portions, size)
        if batch:
            inferred = [
                replace(one, batches=(batch,)) if isinstance(one, Inferred) else one for one in inferred
            ]
        if done := [one for one in inferred if isinstance(one, Inferred)]:
            self._last_success = time.monotonic()
            spent = max(one.ended for one in done) - min(one.started for one in done)
            self.room.worked(sum(len(one.scores) for one in done), spent)
        return inferred


def _reason(live: LiveSettings, error: Exception) -> str:
    """Why a model is not served: ours say it in a sentence, others with their type."""
    return str(error) if isinstance(error, PoseError) else f"{live.checkpoint}: {error!r}"
