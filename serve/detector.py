"""People found in pictures that come without boxes, by the operator's detector (hrnet_core/detector.py).

Pictures of several requests share a run where the detector takes several. It has a thread of its own: people
whose boxes are known go on meanwhile. While it is busy, the next run gathers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hrnet_core.errors import ConfigError
from serve.schemas import Problem
from serve.settings import DetectorChoice, ServeArgs, Settings

if TYPE_CHECKING:
    from hrnet_core.detector import Found, PersonDetector, View
    from serve.body import Upload

logger = logging.getLogger("ray.serve")
BoxesFrom = Literal["auto", "detector", "whole_image"]


class Find(Settings):
    """Where a request wants the boxes of its pictures from that come without any."""

    boxes_from: BoxesFrom = "auto"
    """detector, whole_image: the picture is one person; auto: the detector where there is one."""
    score_threshold: float | None = Field(default=None, ge=0, le=1)
    """None: the replica's, else the declared one."""
    max_found: int | None = Field(default=None, ge=1, strict=True)
    """Most people of a picture; None: as many as the replica lets."""


def load_detector(choice: DetectorChoice, threads: int, use_gpu: bool) -> PersonDetector:
    """The detector of a replica, tried on black pictures. ConfigError says what is wrong with it, also where
    its files are not those of `choice.sha256`."""
    from hrnet_core.detector import PersonDetector

    detector = PersonDetector.load(choice.model, threads, use_gpu)
    if choice.sha256 not in ("", detector.sha256):
        raise ConfigError(
            f"{choice.model}: this detector and its declaration have sha256 {detector.sha256[:12]}..., but "
            f"{choice.name} was deployed with {choice.sha256[:12]}...: they have changed since. Deploy it "
            f"again, or put the old files back."
        )
    at_once = "several pictures" if detector.batches else "a picture"  # asked here, so that no request waits
    logger.info("%s finds the people, %s in a run", choice.name, at_once)
    return detector


@dataclass
class Search:
    """What the detector is to do for a request, and how many people may still be taken of those it finds."""

    score_threshold: float
    most: int
    """People of one picture."""
    left: int
    """Of all its pictures; at least one for each of them."""
    pictures: int
    """That the detector has still to look at."""
    seconds: float = 0.0
    """Spent in it and waiting for it."""

    @property
    def people(self) -> int:
        """The most that it can come to."""
        return min(self.most * self.pictures, self.left)

    def best(self, found: Found) -> tuple[Found, list[str]]:
        """Of the people found in the next picture those that are taken, and a warning where some are not."""
        boxes, scores = found
        self.pictures -= 1
        count = min(len(boxes), self.most, self.left - self.pictures)
        self.left -= count
        warnings = []
        if count < len(boxes):
            what = "this many are taken of a picture, or were left of those that one request may have"
            warnings.append(
                f"{len(boxes)} people were found, the {count} that score highest are answered: {what}."
            )
        return (boxes[:count], scores[:count]), warnings


def search_of(
    find: Find, uploads: Sequence[Upload], detector: PersonDetector | None, args: ServeArgs
) -> Search | None:
    """What is asked of the detector; None where it does not look. Problem where it cannot as asked."""
    if find.boxes_from == "detector" and detector is None:
        what = "no detector runs here. Send boxes, or whole_image for a picture that is one person."
        raise Problem.of_field("boxes_from", "invalid-field", what)
    if find.max_found and find.max_found > args.max_found:
        what = f"at most {args.max_found} people are found in a picture here."
        raise Problem.of_field("max_found", "invalid-field", what, limit=args.max_found)
    boxed = [upload.boxes_xywh for upload in uploads if upload.boxes_xywh is not None]
    if detector is None or find.boxes_from == "whole_image" or len(boxed) == len(uploads):
        return None
    threshold = find.score_threshold
    if threshold is None:
        threshold = threshold_of(detector, args)
    left = args.limits.max_people - sum(map(len, boxed))
    return Search(threshold, find.max_found or args.max_found, left, len(uploads) - len(boxed))


def threshold_of(detector: PersonDetector, args: ServeArgs) -> float:
    """Score of people, where a request says none."""
    return detector.declaration.score_threshold if args.score_threshold is None else args.score_threshold


def pixels_of_view(detector: PersonDetector) -> int:
    """What a picture takes in memory while the detector looks at it: floats, of 4 times a pixel's bytes."""
    width, height = detector.declaration.input_size
    return 4 * width * height


@dataclass(frozen=True, eq=False)
class _Wanted:
    """A picture that waits for the detector."""

    detector: PersonDetector
    view: View
    score_threshold: float
    found: asyncio.Future[Found]


class Finder:
    """The detector's queue and its thread. All but the runs is of one event loop."""

    def __init__(self, most: int, ran: Callable[[PersonDetector, int, float], None]) -> None:
        """most: pictures of a run. ran: told of each run: the detector, how many pictures, seconds."""
        self.most = most
        self._ran = ran
        self._thread = ThreadPoolExecutor(1, "detect")
        self._waiting: deque[_Wanted] = deque()
        self._working: asyncio.Task[None] | None = None

    async def find(
        self, detector: PersonDetector, views: Sequence[View], score_threshold: float
    ) -> list[Found]:
        """The people of each picture."""
        loop = asyncio.get_running_loop()
        wanted = [_Wanted(detector, view, score_threshold, loop.create_future()) for view in views]
        self._waiting += wanted
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        try:
            return [await one.found for one in wanted]
        finally:
            for one in wanted:  # of who gave up, or failed: the rest is not looked at
                one.found.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            started = time.perf_counter()
            answers = await loop.run_in_executor(self._thread, _run, batch)
            self._ran(batch[0].detector, len(batch), time.perf_counter() - started)
            for one, answer in zip(batch, answers, strict=True):
                if one.found.done():
                    continue
                if isinstance(answer, Exception):
                    one.found.set_exception(answer)
                else:
                    one.found.set_result(answer)

    def _next(self) -> list[_Wanted]:
        """The pictures of the next run: as many of one detector as it takes, in the order of their coming."""
        batch: list[_Wanted] = []
        while self._waiting:
            first = self._waiting[0]
            if first.found.done():
                self._waiting.popleft()
                continue
            if batch and (first.detector is not batch[0].detector or len(batch) >= self.most):
                break
            batch.append(self._waiting.popleft())
            if not first.detector.batches:
                break
        return batch


def _run(batch: Sequence[_Wanted]) -> list[Found | Exception]:
    """An answer for each; where a run fails, its pictures are tried one by one, so that each fails for its
    own sake only."""
    try:
        views, thresholds = [one.view for one in batch], [one.score_threshold for one in batch]
        return list(batch[0].detector.find(views, thresholds))
    except Exception as error:
        if len(batch) == 1:
            return [error]
        return [_run([one])[0] for one in batch]
