"""A request's pictures on their way to the network: headers, room, decoding, the detector, crops."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from serve.body import Upload
from serve.detector import Finder, Search, pixels_of_view
from serve.model import ServedModel
from serve.room import Room
from serve.settings import ServeArgs
from serve.traces import Spans
from serve.work import Decoded, Opened, cut, decode, inspect

if TYPE_CHECKING:
    from hrnet_core.detector import PersonDetector

DECODING_THREADS = 4
# A thread costs more than the headers of pictures of so many bytes, whatever stands in them.
INSPECTED_HERE = 2**19


class Pictures:
    """Of all requests of a replica. detected: called after each run of the detector with it, the number of
    pictures and seconds."""

    def __init__(
        self, args: ServeArgs, room: Room, detected: Callable[[PersonDetector, int, float], None]
    ) -> None:
        self.limits, self.room = args.limits, room
        self.wait_s = args.deadline_s / 2
        self.threads = ThreadPoolExecutor(DECODING_THREADS, "decode")
        self.finder = Finder(args.max_batch_pictures, detected)

    @asynccontextmanager
    async def opened(
        self, model: ServedModel, uploads: list[Upload], search: Search | None, keep: bool, spans: Spans
    ) -> AsyncIterator[list[Decoded]]:
        """A request's pictures, decoded and cut, once there is room for their pixels: all at once, or one
        after the other where they are more than is ever held. keep: the pixels of its one picture, too."""
        limits, pixels = self.limits, self.room.pixels
        if sum(len(upload.data) for upload in uploads) <= INSPECTED_HERE:
            headers = [inspect(upload, limits) for upload in uploads]
        else:
            headers = await _in_threads(self.threads, inspect, [(upload, limits) for upload in uploads])
        areas = [header.width * header.height for header in headers]
        width, height = model.predictor.spec.input_size
        whole = 0 if search else 1  # person of a picture without boxes
        people = sum(whole if one.boxes_xywh is None else len(one.boxes_xywh) for one in uploads)
        beside = people * width * height
        if search and model.detector:
            beside += search.people * width * height + search.pictures * pixels_of_view(model.detector)
        at_once = len(uploads) if beside + sum(areas) <= pixels.limit else 1
        jobs = [(model, *one, keep, search is not None) for one in zip(uploads, headers, strict=True)]
        async with contextlib.AsyncExitStack() as held:
            try:
                with spans.stage("wait for room"):
                    async with asyncio.timeout(self.wait_s):
                        need = beside + (sum(areas) if at_once > 1 else max(areas))
                        keep_only = await held.enter_async_context(pixels.take(need))
            except TimeoutError:
                raise self.room.full("pixels") from None
            decoded: list[Decoded] = []
            for i in range(0, len(jobs), at_once):
                decoded += await self._people_of(model, jobs[i : i + at_once], search, keep, spans)
            for one in decoded:
                spans.add("decode", *one.clock[:2])
                spans.add("crop", *one.clock[2:])
            if not keep:
                keep_only(sum(len(one.people.boxes) for one in decoded) * width * height)
            yield decoded

    async def _people_of(
        self,
        model: ServedModel,
        jobs: list[tuple[Any, ...]],
        search: Search | None,
        keep: bool,
        spans: Spans,
    ) -> list[Decoded]:
        """decode(*job) of each job, and where that leaves it to the detector, the people that it finds."""
        seen = await _in_threads(self.threads, decode, jobs)
        opened = [one for one in seen if isinstance(one, Opened)]
        if not (search and model.detector and opened):
            return seen
        started, views = time.perf_counter(), [one.view for one in opened]
        found = await self.finder.find(model.detector, views, search.score_threshold)
        ended = time.perf_counter()
        spans.add("detect", started, ended)
        search.seconds += ended - started
        cuts = [(model, one, *search.best(people), keep) for one, people in zip(opened, found, strict=True)]
        done = iter(await _in_threads(self.threads, cut, cuts))
        return [next(done) if isinstance(one, Opened) else one for one in seen]


async def _in_threads(pool: ThreadPoolExecutor, work: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> Any:
    """work(*job) of each job, at once. Whoever is told of a failure, or gives up, is told when no thread
    works on it any more: only then is its memory free."""
    running = [pool.submit(work, *job) for job in jobs]
    try:
        return await asyncio.gather(*map(asyncio.wrap_future, running))
    finally:
        if not all(future.done() for future in running):
            await asyncio.to_thread(wait, running)
