"""How far a stage is: a line now and then, on a terminal or in a log, in the same words everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]


class Every:
    """True when it is asked and so many seconds have passed since it was made or last said so; `at_once`: and
    when it is asked first."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic, at_once: bool = False) -> None:
        self._seconds, self._clock = seconds, clock
        self._due = clock() + (0 if at_once else seconds)

    def __call__(self) -> bool:
        now = self._clock()
        due = now >= self._due
        if due:
            self._due = now + self._seconds
        return due


class ProgressLine:
    """ "preprocess: 3 of 14 shards, 512 people, 225 people/s, about 6 s left": at most one in `seconds`, and
    the last. Work that is done before the first stays silent.

    stage: what stands first. total: how many `parts` there are ("shards"). unit: of the work in them
    ("people"), where that is not the parts themselves.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        parts: str,
        unit: str = "",
        *,
        seconds: float = 2,
        clock: Clock = time.monotonic,
    ) -> None:
        self.done, self.work, self._said = 0, 0.0, False
        self._head, self._total, self._parts, self._unit = stage, total, parts, unit
        self._clock, self._due, self._start = clock, Every(seconds, clock), clock()

    def add(self, work: float = 1, seconds: float | None = None, left: float | None = None) -> None:
        """One more part, of so much work. seconds: of working so far; left: until the end. Default: by the
        clock, and by the parts that are done."""
        self.done += 1
        self.work += work
        last = self.done == self._total
        if not self._due() and not (last and self._said):
            return
        self._said = True
        seconds = self._clock() - self._start if seconds is None else seconds
        if left is None:
            left = seconds / self.done * (self._total - self.done)
        unit = self._unit or self._parts
        amount = f", {self.work:,.0f} {unit}" if self._unit else ""
        speed = f", {self.work / seconds:,.0f} {unit}/s" if seconds else ""
        end = "" if last else f", {time_left(left)}"
        print(f"{self._head}: {self.done:,} of {self._total:,} {self._parts}{amount}{speed}{end}", flush=True)


def time_left(seconds: float) -> str:
    """ "about 6 s left"; from 100 s on in minutes, from 100 minutes on in hours."""
    if seconds < 100:
        return f"about {seconds:.0f} s left"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:,.1f} h left"
