"""Load: how an endpoint answers when requests come at a given rate, whether or not it keeps up.

    pictures and boxes -> one request to see that they are answered -> for each rate: arrivals -> a row

Arrivals are an open loop: their times are fixed before the first is sent, as those of clients that know
nothing of each other, and latency counts from the time at which a request was due. A closed loop, whose
clients each wait for their answer, slows down with the server and hides what a queue costs. Nothing is sent
again: a 429 is counted.
"""

from __future__ import annotations

import http.client
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import ConfigError, DataError, Failure
from pipelines.process.progress import Every
from pipelines.sources.boxes import read_boxes
from pipelines.sources.media import list_media
from pipelines.storage.files import read_file
from serve.client import Client, ServerError, first_key

LATE_S = 0.1
"""A request that is sent this much after it was due was not sent at the rate that was asked for."""
PERCENTILES = (50, 95, 99)
NOT_OURS = (ValueError, LookupError, TypeError)
"""Raised where a 200 is no answer of ours."""


@dataclass(frozen=True)
class Asked:
    """One picture with its boxes; None: the whole of it."""

    image: bytes
    boxes: list[list[float]] | None


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Seconds since the first arrival's clock began."""

    due: float
    sent: float
    ended: float
    status: str
    """HTTP status, or "no poses", "timeout", "no connection"."""
    people: int = 0


@dataclass(frozen=True)
class Row:
    """The requests of one rate."""

    rate: float
    outcomes: tuple[Outcome, ...]

    def figures(self) -> dict[str, Any]:
        """Latencies in ms are those of 200s, NaN without one. Rates are over the time to the last answer."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        good = [outcome for outcome in self.outcomes if outcome.status == "200"]
        waited = [1000 * (outcome.ended - outcome.due) for outcome in good] or [float("nan")]
        seconds = max(outcome.ended for outcome in self.outcomes)
        late = [outcome.sent - outcome.due for outcome in self.outcomes]
        slow = {f"p{p}_ms": float(np.percentile(waited, p, method="higher")) for p in PERCENTILES}
        return {
            "rate": self.rate,
            "sent": len(self.outcomes),
            "seconds": seconds,
            "answered_per_s": len(good) / seconds,
            "people_per_s": sum(outcome.people for outcome in good) / seconds,
            **slow,
            "max_ms": max(waited),
            "statuses": dict(sorted(counts.items())),
            "share_429": counts["429"] / len(self.outcomes),
            "sent_late": sum(lag > LATE_S for lag in late),
            "latest_s": max(late),
        }


@dataclass(frozen=True)
class Load:
    """What was measured, a row for each rate."""

    url: str
    pictures: int
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: NaN, the latency of no answer, is left out."""
        told = [{k: v for k, v in row.figures().items() if v == v} for row in self.rows]
        return {"url": self.url, "pictures": self.pictures, "rates": told}

    def __str__(self) -> str:
        head = f"{'rate/s':>7} {'sent':>7} {'200':>7} {'429':>7} {'other':>6} {'p50 ms':>8} {'p95 ms':>8}"
        lines, notes = [f"{head} {'p99 ms':>8} {'answers/s':>10} {'people/s':>9}"], []
        for figures in (row.figures() for row in self.rows):
            counts = figures["statuses"]
            good, refused = counts.get("200", 0), counts.get("429", 0)
            times = " ".join(f"{figures[f'p{p}_ms']:8.0f}" if good else f"{'-':>8}" for p in PERCENTILES)
            speed = f"{figures['answered_per_s']:10.1f} {figures['people_per_s']:9.1f}"
            share, others = f"{100 * figures['share_429']:.1f}%", figures["sent"] - good - refused
            numbers = f"{figures['rate']:7g} {figures['sent']:7} {good:7} {share:>7} {others:6}"
            lines.append(f"{numbers} {times} {speed}")
            notes += _notes(figures)
        return "\n".join([*lines, *notes])


def _notes(figures: dict[str, Any]) -> list[str]:
    """What the table has no column for."""
    rate, others = f"at {figures['rate']:g}/s", []
    for status, count in figures["statuses"].items():
        if status not in ("200", "429"):
            others.append(f"{count} x {status}")
    notes = [f"{rate}: {', '.join(others)}"] if others else []
    if figures["sent_late"]:
        notes.append(
            f"{rate}: {figures['sent_late']} of {figures['sent']} were sent more than {1000 * LATE_S:.0f} ms "
            f"after they were due, the last by {figures['latest_s']:.1f} s: this client could not keep the "
            f"rate. Their latency holds that wait too. Give it a machine of its own, or more --at-once."
        )
    return notes


def load(
    url: str,
    sources: Sequence[str],
    *,
    rates: Sequence[float] = (5.0,),
    seconds: float = 30.0,
    boxes: str | None = None,
    even: bool = False,
    seed: int = 0,
    at_once: int = 512,
    timeout_s: float = 60.0,
    key_file: str | None = None,
) -> Load:
    """Ask an endpoint for poses at each of the rates (requests a second), for so many seconds each.

    sources: pictures, folders, globs, URIs, asked for in turn. boxes: as hrnet predict takes them. even:
    arrivals at equal distances; else at random (Poisson), by the seed. at_once: requests on the way at most.

    ConfigError or DataError where nothing can be asked, Failure where nothing answers.
    """
    asked, rows = _pictures(sources, boxes), []
    try:
        key = first_key(Path(key_file) if key_file else None)
        client = Client(url, key=key, timeout_s=timeout_s, attempts=1)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    with client:
        _try(client, url, asked[0])
        for rate in rates:
            due = arrivals(rate, seconds, even, seed)
            rows.append(Row(rate, tuple(_at(client, due, asked, at_once, rate))))
    return Load(url, len(asked), tuple(rows))


def arrivals(rate: float, seconds: float, even: bool, seed: int) -> NDArray[np.float64]:
    """Times (N,) in s at which requests are due, the first at 0: `rate` of them a second within `seconds`."""
    if even:
        return np.arange(max(1, round(rate * seconds))) / rate
    # Of a Poisson process, whose number is given: uniform, in order.
    times = np.sort(np.random.default_rng(seed).uniform(0, seconds, max(1, round(rate * seconds))))
    return times - times[0]


def _pictures(sources: Sequence[str], boxes: str | None) -> list[Asked]:
    media, _ = list_media(sources)
    pictures = [one for one in media if one.kind == "picture"]
    if not pictures:
        raise DataError(f"{', '.join(sources)}: no picture is there to ask with.")
    entries = read_boxes(boxes).match(pictures)[0] if boxes else {}
    asked = []
    for one in pictures:
        entry = entries.get(one.name)
        if boxes is None:
            asked.append(Asked(read_file(one.uri), None))
        elif entry is not None and len(entry.boxes):
            asked.append(Asked(read_file(one.uri), entry.boxes[:, :4].astype(float).tolist()))
    if not asked:
        raise DataError(f"{boxes}: no picture of the sources has a box in it.")
    return asked


def _try(client: Client, url: str, asked: Asked) -> None:
    """One request, so that a mistake is told at once and not counted a thousand times."""
    try:
        _people(client, asked)
    except ServerError as error:
        if error.status in (429, 503):
            return  # it is there, and busy
        raise ConfigError(f"{url}: the first request was answered {error}") from None
    except NOT_OURS:
        raise ConfigError(f"{url}/v1/poses answers, but not with poses: is this an hrnet endpoint?") from None
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"{url} does not answer: {error or type(error).__name__}.") from None


def _at(
    client: Client, due: NDArray[np.float64], asked: Sequence[Asked], at_once: int, rate: float
) -> Iterable[Outcome]:
    """Send the requests when they are due, wait for their ends; in the order of their arrival."""
    futures: list[Future[Outcome]] = []
    tell, began = Every(5), time.perf_counter()
    pool = ThreadPoolExecutor(at_once, "load")
    try:
        for when, one in zip(due.tolist(), itertools.cycle(asked)):
            time.sleep(max(0.0, when - (time.perf_counter() - began)))
            futures.append(pool.submit(_ask, client, one, when, began))
            if tell():
                done = sum(future.done() for future in futures)
                print(
                    f"load: at {rate:g}/s, {len(futures):,} of {len(due):,} sent, {done:,} ended", flush=True
                )
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ask(client: Client, asked: Asked, due: float, began: float) -> Outcome:
    sent, people = time.perf_counter() - began, 0
    try:
        status, people = "200", _people(client, asked)
    except ServerError as error:
        status = str(error.status)
    except NOT_OURS:
        status = "no poses"
    except TimeoutError:
        status = "timeout"
    except (OSError, http.client.HTTPException):
        status = "no connection"
    return Outcome(due, sent, time.perf_counter() - began, status, people)


def _people(client: Client, asked: Asked) -> int:
    """How many an answer has."""
    return len(client.poses(asked.image, asked.boxes)["results"][0]["persons"])
