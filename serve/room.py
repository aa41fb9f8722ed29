"""What one replica has room for: bodies being read, their bytes, places for work, pixels in memory, time.

Each is counted apart, so that many small things of one kind do not keep out another: a thousand slow bodies
take no place, and a place held for a long time stops no body from being read. All of it is of one event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from serve.haproxy import FULL_HEADER
from serve.keys import Key, Rates
from serve.schemas import Problem
from serve.settings import ServeArgs


class Room:
    """The counts of a replica and their limits. Whoever finds no room gets a Problem (429, `reason`)."""

    def __init__(self, args: ServeArgs) -> None:
        self.args = args
        self.bodies = 0
        self.bytes_held = 0
        self.in_progress = 0
        self._of_key: Counter[str] = Counter()
        self._rates = Rates()
        self.pixels = Pixels(args.max_pixels_held)
        self.usual_s = 1.0
        """Moving average of the work on a request, for Retry-After."""
        self.people = 0
        """Whose crops wait for the network or are in it."""
        self._recent_people = self._recent_s = 0.0

    def expect(self, key: Key | None) -> None:
        """Problem where a request would find no place, or no time before its deadline: its body would be read
        for nothing."""
        self._has_place(key)
        self._in_time(0)

    @contextmanager
    def body(self, key: Key | None) -> Iterator[Callable[[int], None]]:
        """While a body is held: its bytes are added by calling what is given. Ends with the request.

        key: whose request it is; it counts for its rate.
        """
        self._within_rate(key)
        held = 0

        def add(more: int) -> None:
            nonlocal held
            if self.bytes_held + more > max(self.args.max_bytes_held, self.args.limits.max_body_bytes):
                raise self.full("bytes")
            held += more
            self.bytes_held += more

        try:
            yield add
        finally:
            self.bytes_held -= held

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a body is read."""
        if self.bodies >= self.args.max_bodies:
            raise self.full("bodies")
        self.bodies += 1
        try:
            yield
        finally:
            self.bodies -= 1

    @contextmanager
    def place(self, key: Key | None) -> Iterator[None]:
        """While a request whose body is whole is worked on."""
        self._has_place(key)
        name = key.name if key else ""
        self.in_progress += 1
        self._of_key[name] += 1
        started = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self.in_progress -= 1
            self._of_key[name] -= 1
            self.usual_s += 0.1 * (asyncio.get_running_loop().time() - started - self.usual_s)

    @contextmanager
    def time_for(self, people: int) -> Iterator[None]:
        """While so many people of a request are worked on. Problem (429) where those before them take so long
        that there would be no answer before the deadline."""
        self._in_time(people)
        self.people += people
        try:
            yield
        finally:
            self.people -= people

    def worked(self, people: int, seconds: float) -> None:
        """Remember how long the network took for so many people."""
        self._recent_people = 0.9 * self._recent_people + people
        self._recent_s = 0.9 * self._recent_s + seconds

    @property
    def seconds_a_person(self) -> float:
        """Of the network, over its last ten or so batches; 0 before the first."""
        return self._recent_s / self._recent_people if self._recent_people else 0.0

    @property
    def waiting_s(self) -> float:
        """Of the network, for the people that wait."""
        return self.people * self.seconds_a_person

    def _in_time(self, people: int) -> None:
        if late := self._late_s(people):
            raise self.full("wait", late)

    def _late_s(self, people: int) -> float:
        """Beyond the deadline, behind those that wait; 0 in time. Who is too slow alone is let in: it would
        be too slow at any time, and 504 says so."""
        own, deadline = people * self.seconds_a_person, self.args.deadline_s
        return 0.0 if own > deadline else max(0.0, own + self.waiting_s - deadline)

    def _has_place(self, key: Key | None) -> None:
        if self._no_place():
            raise self.full("places")
        share = (key.share or self.args.key_share) if key else 1.0
        if key and self._of_key[key.name] >= max(1, math.floor(share * self.args.max_requests)):
            raise self.full("share")

    def _no_place(self) -> bool:
        return self.in_progress >= self.args.max_requests

    def _within_rate(self, key: Key | None) -> None:
        rate = (key.rate or self.args.key_rate) if key else None
        if not key or rate is None:
            return
        wait = self._rates.wait_s(key.name, rate)
        if wait:
            what = f"{key.name} may make {rate:g} requests a second here. Try again later."
            retry = {"Retry-After": str(math.ceil(wait))}
            raise Problem("overloaded", what, headers=retry, reason="rate")

    def full(self, reason: str, wait_s: float | None = None) -> Problem:
        """wait_s: until there is room again, where that is known; else as long as a request usually takes."""
        what = {
            "places": f"{self.in_progress} requests are in progress here, as many as are taken.",
            "share": "the key has as many requests in progress here as it may.",
            "bodies": f"{self.bodies} bodies are being read here, as many as are taken.",
            "bytes": f"bodies of {self.bytes_held:,} bytes are held here, as many as are taken.",
            "wait": f"{self.people} people are waiting here, {self.waiting_s:.0f} s of work: "
            f"behind them no answer would come within {self.args.deadline_s:g} s.",
            "pixels": f"{self.pixels.held:,} decoded pixels are in memory here, as many as are taken.",
        }[reason]
        headers = {"Retry-After": str(math.ceil(self.usual_s if wait_s is None else wait_s))}
        if self._nobody_fits():
            headers[FULL_HEADER] = reason
        return Problem("overloaded", f"{what} Try again later.", headers=headers, reason=reason)

    def _nobody_fits(self) -> bool:
        """Whether a request would be refused whoever sent it and whatever it holds."""
        return self._no_place() or self._late_s(0) > 0


class Pixels:
    """Pixels in memory, let in in the order of asking, so that a large picture is not passed by for ever."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[Callable[[int], None]]:
        """Room for `count` pixels, once there is; what is given, called with a smaller count, gives the rest
        back early. More than the limit waits until nothing else is held."""
        await self._enter(count)

        def keep(fewer: int) -> None:
            nonlocal count
            self._leave(count - fewer)
            count = fewer

        try:
            yield keep
        finally:
            self._leave(count)

    async def _enter(self, count: int) -> None:
        if not self._waiting and self._fits(count):
            self.held += count
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting = deque(one for one in self._waiting if one[1] is not turn)
                self._let_in()  # a smaller one behind it may fit
            else:  # let in at the moment of giving up
                self._leave(count)
            raise

    def _fits(self, count: int) -> bool:
        return not self.held or self.held + count <= self.limit

    def _leave(self, count: int) -> None:
        self.held -= count
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            count, turn = self._waiting.popleft()
            if not turn.done():
                self.held += count
                turn.set_result(None)
