"""What the endpoint adds to the bare predictor, and what it does when more is asked than it can do.

    python tests/benchmarks/bench_serve.py                                # HAProxy, W32 for saturation
    python tests/benchmarks/bench_serve.py --haproxy False --only added   # Serve's Python proxy
    python tests/benchmarks/bench_serve.py --only ramp

added       one client at a fixed pace: the request's time less that of the same picture through the predictor
            in this process, in turn (A B A B ...), both as medians
saturation  people per second of 4, 16, 64 and 256 clients that ask as fast as they are answered, and of the
            predictor alone in turn with them; the limit is on people per second of CPU, which other work
            on the machine lengthens less; shares of 200 and 429; how long /readyz takes meanwhile
impatient   the same of 256 clients that ask again after .2 s whatever they are told
ramp        replicas over time while clients come and go, with --serve.max-replicas 2

Clients and the endpoint share this machine, so few cores are shared out among them. Exit code 1 where a limit
is missed. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import psutil
from ratios import exit_code, judge

sys.path.insert(0, str(Path(__file__).parents[1]))
from free_ports import free_port

from hrnet_core.images import decode_image, encode_jpeg
from hrnet_core.predictor import PosePredictor
from pipelines.benchmark import machine, save_random
from pipelines.cluster.session import ray_session
from pipelines.deploy import deploy
from pipelines.serving import live
from pipelines.settings.config import RaySettings, RunSettings, ServeSettings
from pipelines.settings.config_file import load_config

ADDED_MS, OF_BARE, READY_MS = 5, 0.85, 100
IMPATIENT_S = 0.2
Answered = collections.namedtuple("Answered", "status seconds retry_s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="w32_256x192", help="of saturation")
    parser.add_argument("--haproxy", default="True", choices=["True", "False"])
    parser.add_argument("--people", type=int, default=4, help="of a request")
    parser.add_argument("--batch", type=int, help="people of a forward pass at most, of saturation")
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", nargs="*", default=["added", "saturation", "impatient", "ramp"])
    args = parser.parse_args()
    print(f"{machine('cpu')}, load {os.getloadavg()[0]:.1f}, HAProxy {args.haproxy}", flush=True)
    haproxy = args.haproxy == "True"
    if "added" in args.only:
        with endpoint("tiny", haproxy=haproxy, threads=1) as (url, predictor):
            added(url, predictor)
    if "saturation" in args.only:
        batch = {"max_batch_people": args.batch} if args.batch else {}
        with endpoint(args.config, haproxy=haproxy, threads=1, **batch) as (url, predictor):
            saturation(url, predictor, args.people, args.clients, args.seconds)
    if "impatient" in args.only:
        with endpoint("tiny", haproxy=haproxy, threads=1) as (url, predictor):
            saturation(url, predictor, args.people, [256], args.seconds, impatient=True)
    if "ramp" in args.only:
        with endpoint("tiny", haproxy=haproxy, max_replicas=2, max_requests=8, threads=1) as (url, _):
            ramp(url, args.seconds)
    return exit_code()


@contextmanager
def endpoint(config: str, **settings: object) -> Iterator[tuple[str, PosePredictor]]:
    """A deployment of a network of random weights, and its predictor in this process."""
    from ray import serve

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        save_random(checkpoint, load_config(config))
        predictor = PosePredictor.load(checkpoint, "cpu", "float32", threads=1)
        os.environ.setdefault("RAY_worker_niceness", "0")  # as hrnet deploy does
        with ray_session(RaySettings(), workers_shown=False):
            try:
                fixed = {"port": free_port(), "cpus_per_replica": 0.5, "mode": "float32", "flip_test": False}
                given = ServeSettings(**{**fixed, "deadline_s": 600, **settings})  # type: ignore[arg-type]
                yield deploy(str(checkpoint), given, run=RunSettings(storage=folder), block=False), predictor
            finally:
                serve.shutdown()


def picture(people: int) -> tuple[bytes, list[list[float]]]:
    """A JPEG of 640 x 480 px and boxes in it."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (24, 32, 3), np.uint8)
    image = cv2.resize(patches, (640, 480), interpolation=cv2.INTER_CUBIC)
    boxes = [[20.0 + 30 * (i % 16), 40.0 + 100 * (i // 16 % 3), 120.0, 240.0] for i in range(people)]
    return encode_jpeg(image), boxes


def bare(predictor: PosePredictor, data: bytes, boxes: list[list[float]]) -> None:
    """The same work as a request's, without the request."""
    predictor(decode_image(data, apply_exif=True), boxes, flip_test=False)


class Client:
    """Keeps a connection open; the cheapest that there is, as it takes its time from the endpoint."""

    def __init__(self, url: str, data: bytes, boxes: list[list[float]]) -> None:
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + data
        body += b'\r\n--b\r\nContent-Disposition: form-data; name="boxes"\r\n\r\n'
        body += json.dumps(boxes).encode() + b"\r\n--b--\r\n"
        kind = "Content-Type: multipart/form-data; boundary=b"
        head = f"POST /v1/poses HTTP/1.1\r\nHost: {self.host}\r\n{kind}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        self.poses = head.encode() + body

        self.reader: asyncio.StreamReader | None = None

    async def ask(self, request: bytes) -> Answered:
        started, retry_s = time.perf_counter(), 0.2
        try:
            if self.reader is None:
                self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
            self.writer.write(request)
            head = await self.reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
            await self.reader.readexactly(int(fields[b"content-length"]))
            status, retry_s = int(head.split()[1]), float(fields.get(b"retry-after", retry_s))
            if fields.get(b"connection") == b"close":
                self.writer.close()
                self.reader = None
        except (OSError, asyncio.IncompleteReadError):
            self.reader, status = None, 0
        return Answered(status, time.perf_counter() - started, retry_s)

    async def go_on(self, answers: list[Answered], end: float, impatient: bool) -> None:
        while time.monotonic() < end:
            answer = await self.ask(self.poses)
            answers.append(answer)
            if answer.status != 200:
                await asyncio.sleep(IMPATIENT_S if impatient else answer.retry_s)


def added(url: str, predictor: PosePredictor, pairs: int = 150, pace_s: float = 0.1) -> None:
    data, boxes = picture(1)
    bare(predictor, data, boxes)

    async def run() -> list[tuple[float, float]]:
        client, times = Client(url, data, boxes), []
        for _ in range(pairs + 20):
            await asyncio.sleep(pace_s)
            asked = (await client.ask(client.poses)).seconds
            await asyncio.sleep(pace_s)
            started = time.perf_counter()
            bare(predictor, data, boxes)
            times.append((asked, time.perf_counter() - started))
        return times[20:]

    times = asyncio.run(run())
    asked, alone = (1000 * np.array(side) for side in zip(*times, strict=True))
    p50, p99 = (np.percentile(asked, q) - np.percentile(alone, q) for q in (50, 99))
    median = [float(np.median(side)) for side in (asked, alone)]
    print(f"one person: {median[0]:.1f} ms, alone {median[1]:.1f} ms; p99 {p99:+.1f} ms")
    judge("p50 that the endpoint adds, ms", float(p50), ADDED_MS)


async def asking(
    url: str, data: bytes, boxes: list[list[float]], clients: int, seconds: float, impatient: bool = False
) -> list[Answered]:
    """What so many clients were answered that ask as fast as they are answered. Refused they wait, as long as
    they are told or less."""
    answers: list[Answered] = []
    end = time.monotonic() + seconds
    await asyncio.gather(*(Client(url, data, boxes).go_on(answers, end, impatient) for _ in range(clients)))
    return answers


def closed_loop(url: str, data: bytes, boxes: list[list[float]], clients: int, seconds: float) -> float:
    """Answers per second of such clients."""
    started = time.perf_counter()
    answers = asyncio.run(asking(url, data, boxes, clients, seconds))
    return sum(a.status == 200 for a in answers) / (time.perf_counter() - started)


def saturation(
    url: str,
    predictor: PosePredictor,
    people: int,
    clients: list[int],
    seconds: float,
    impatient: bool = False,
) -> None:
    data, boxes = picture(people)

    def alone() -> tuple[float, float]:
        """People per second, and per second of CPU."""
        done, started, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started < seconds / 2:
            bare(predictor, data, boxes)
            done += people
        return done / (time.perf_counter() - started), done / (time.process_time() - cpu)

    for count in clients:
        before = alone()
        started, cpu = time.perf_counter(), cpu_of_replicas()
        with get_context("spawn").Pool(1) as pool:  # a process of its own: these clients keep a loop busy
            ready = pool.apply_async(slowest_ready, (url, seconds))
            answers = asyncio.run(asking(url, data, boxes, count, seconds, impatient))
            slowest = ready.get()
        done = people * sum(a.status == 200 for a in answers)
        rate, by_cpu = done / (time.perf_counter() - started), done / (cpu_of_replicas() - cpu)
        rate_alone, by_cpu_alone = (statistics.mean(pair) for pair in zip(before, alone(), strict=True))
        statuses = dict(collections.Counter(a.status for a in answers))
        p50, p99 = np.percentile([a.seconds for a in answers if a.status == 200], (50, 99))
        print(
            f"{count} clients: {rate:.1f} people/s, alone {rate_alone:.1f}; p50 {p50:.2f}, p99 {p99:.2f} s; "
            f"{statuses}; by CPU time {by_cpu:.1f} and {by_cpu_alone:.1f}",
            flush=True,
        )
        judge(f"of the bare predictor, {count} clients", by_cpu / by_cpu_alone, OF_BARE, at_most=False)
        judge(f"/readyz with {count} clients, slowest, ms", 1000 * slowest, READY_MS)


def slowest_ready(url: str, seconds: float) -> float:
    """s of the slowest answer of /readyz, asked ten times a second."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    end, times = time.monotonic() + seconds, []
    while time.monotonic() < end:
        started = time.perf_counter()
        connection.request("GET", "/readyz")
        connection.getresponse().read()
        times.append(time.perf_counter() - started)
        time.sleep(0.1)
    return max(times)


def replicas() -> list[psutil.Process]:
    title = f"ray::ServeReplica:{live.APP}"
    return [p for p in psutil.Process().children(recursive=True) if "".join(p.cmdline()).startswith(title)]


def cpu_of_replicas() -> float:
    """Seconds of CPU that the replicas have used."""
    return sum(sum(p.cpu_times()[:2]) for p in replicas())


def ramp(url: str, seconds: float) -> None:
    data, boxes = picture(2)

    async def run() -> None:
        started = time.monotonic()
        for count in (1, 12, 12, 1):
            answers = await asking(url, data, boxes, count, seconds)
            there = len(await asyncio.to_thread(live.states))
            statuses = dict(collections.Counter(a.status for a in answers))
            p50 = np.median([a.seconds for a in answers if a.status == 200])
            print(
                f"after {time.monotonic() - started:4.0f} s, {count:2d} clients: {there} replicas, "
                f"{len(answers) / seconds:.0f} requests/s, p50 {1000 * p50:.0f} ms, {statuses}",
                flush=True,
            )
            most.append(there)

    most: list[int] = []
    asyncio.run(run())
    judge("replicas under the ramp", max(most), 2, at_most=False)


if __name__ == "__main__":
    sys.exit(main())
