"""What a request may do to a replica: faults of its input are told, and what it holds is bounded."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, Histogram
from test_serve import PNG, call, form, photo, save_tiny, service_of

from hrnet_core.images import check_image, decode_image, encode_jpeg
from serve.metrics import SECONDS, Sums
from serve.room import Pixels, Room
from serve.routes import make_app
from serve.service import PoseService
from serve.settings import Limits, LiveSettings
from serve.work import pixels_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", 0)


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> PoseService:
    return service_of(checkpoint)


def post(service: PoseService, **options: Any) -> httpx.Response:
    return call(service, "POST", "/v1/poses", **options)


# --- faults of the input ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1e-40, 1e-40), (1e-44, 5e-1), (0.3, 0.6), (1, 1)])
def test_a_box_of_a_pixel_or_in_fractions_is_refused_with_the_way_out(
    service: PoseService, size: tuple[float, float]
) -> None:
    response = post(service, **form(boxes=[[0.1, 0.2, *size]]))
    assert response.status_code == 422
    assert "multiplied by its width and height" in response.json()["detail"]


def test_every_box_that_is_taken_is_answered_in_numbers(service: PoseService) -> None:
    thin = [[3, 3, 1e-30, 1.5], [3, 3, 40, 1e-44], [63.9, 47.9, 1.01, 1.01]]
    answer = post(service, **form(boxes=thin))
    assert answer.status_code == 200, answer.text
    points = np.array([person["keypoints"] for person in answer.json()["results"][0]["persons"]], float)
    assert points.shape == (3, 17, 3)
    assert np.isfinite(points).all()


MANY = {
    "numbers": b'{"image": "", "boxes": [' + b"1," * 20_000 + b"1]}",
    "lists": b'{"image": "", "boxes": [' + b"[]," * 20_000 + b"[]]}",
    "pictures": b'{"image": [' + b'"",' * 20_000 + b'""]}',
    "fields": b"{" + b",".join(b'"%d":1' % i for i in range(20_000)) + b"}",
}


@pytest.mark.parametrize("what", MANY)
def test_a_body_of_many_times_more_values_than_a_request_has_is_not_parsed(
    service: PoseService, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser holds the interpreter: 30 MB of empty lists were 10 s in which nobody else was answered."""
    for options in (
        {"content": MANY[what], "headers": {"content-type": "application/json"}},
        {"files": {"image": PNG, "boxes": ("boxes", MANY[what])}},
    ):
        with monkeypatch.context() as without:
            without.setattr("serve.body.json.loads", None)
            response = post(service, **options)
        assert response.status_code in (400, 422)
        assert "more than 11,152 values. One request has at most 128 people." in response.json()["detail"]


def test_who_sends_somewhat_too_much_is_told_how_many_are_taken(service: PoseService) -> None:
    assert "at most 128" in post(service, **form(boxes=[[1, 1, 9, 9]] * 2000)).json()["detail"]


def test_what_a_client_sent_is_not_sent_back_whole(service: PoseService) -> None:
    body = json.dumps({"a" * 1_000_000: 1})
    response = post(service, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.json()["field"] == "a" * 200 + "..."
    assert len(response.content) < 1000


def test_half_a_surrogate_pair_in_a_name_is_a_problem_not_a_defect(service: PoseService) -> None:
    body = b'{"image": "", "\\ud800": 1}'
    response = post(service, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.json()["field"] == "?"


@pytest.mark.parametrize("given", [b"caf\xe9", "café".encode(), b"x" * 300, b"a b"])
def test_a_request_id_that_is_no_plain_text_is_replaced(service: PoseService, given: bytes) -> None:
    response = post(service, **form(), headers={b"x-request-id": given})
    assert response.status_code == 200
    assert len(response.json()["request_id"]) == 36


def test_damaged_jpeg_data_are_answered_with_a_warning(service: PoseService) -> None:
    whole = encode_jpeg(photo())
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 20] = b"\xa5" * 20
    (result,) = post(service, **form(whole)).json()["results"]
    assert result["warnings"] == []
    (result,) = post(service, **form(bytes(damaged))).json()["results"]
    assert "JPEG data are damaged" in result["warnings"][0]
    drawn = call(service, "POST", "/v1/overlay", **form(bytes(damaged)))
    assert drawn.headers["x-warning"] == result["warnings"][0]


JPEGS: dict[str, tuple[str, dict[str, Any]]] = {
    "4:4:4": ("RGB", {"subsampling": 0, "quality": 95}),
    "4:2:2": ("RGB", {"subsampling": 1}),
    "4:2:0": ("RGB", {"subsampling": 2, "quality": 30}),
    "4:1:1": ("RGB", {"subsampling": "4:1:1"}),
    "progressive": ("RGB", {"progressive": True, "subsampling": 2}),
    "restarts": ("RGB", {"restart_marker_rows": 1}),
    "RGB": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
}


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(320, 240), (321, 43)])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_whole_jpeg_is_decoded_to_the_pixels_of_evaluation_and_not_called_damaged(
    kind: str, size: tuple[int, int], orientation: int
) -> None:
    """Evaluation decodes with OpenCV; the endpoint with what tells of damage."""
    (mode, options), content, exif = JPEGS[kind], io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(4, *size)).convert(mode).save(content, "JPEG", exif=exif, **options)
    data = content.getvalue()
    pixels, warnings = pixels_of(data, check_image(data))
    assert warnings == []
    np.testing.assert_array_equal(pixels, decode_image(data, apply_exif=True))


def test_real_photographs_are_decoded_to_the_pixels_of_evaluation(real_data: Path) -> None:
    files = sorted((real_data / "coco").rglob("*.jpg"))[:40]
    assert files
    for file in files:
        data = file.read_bytes()
        pixels, warnings = pixels_of(data, check_image(data))
        assert warnings == []
        np.testing.assert_array_equal(pixels, decode_image(data, apply_exif=True), err_msg=file.name)


def test_an_unknown_query_parameter_is_refused_with_those_there_are(service: PoseService) -> None:
    response = call(service, "POST", "/v1/overlay?treshold=0.5", **form())
    assert response.status_code == 422
    assert response.json()["detail"] == (
        "treshold: unknown query parameter; there are boxes_from, max_found, score_threshold, threshold."
    )
    assert call(service, "POST", "/v1/overlay?threshold=0.5", **form()).status_code == 200
    assert call(service, "GET", "/?from=a-newsletter").status_code == 200, "the page is for people"


def test_a_form_that_was_cut_off_is_said_to_be(service: PoseService) -> None:
    request = httpx.Request("POST", "http://test", files={"image": PNG, "boxes": (None, "[]")})
    body, media_type = request.read(), {"content-type": request.headers["content-type"]}
    assert post(service, content=body, headers=media_type).status_code == 200
    for length in (len(body) // 2, len(body) - 5):
        response = post(service, content=body[:length], headers=media_type)
        assert response.status_code == 400
        assert "cut off" in response.json()["detail"]


# --- bodies and places --------------------------------------------------------------------------


def app_client(service: PoseService) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service)), base_url="http://test")


def slow(first: bytes = b"-", pause_s: float = 60) -> dict[str, Any]:
    """A request whose body begins and then goes on a byte at a time."""

    async def body() -> AsyncIterator[bytes]:
        yield first
        while True:
            await asyncio.sleep(pause_s)
            yield b"-"

    return {"content": body(), "headers": {"content-type": "multipart/form-data; boundary=b"}}


def test_slow_bodies_take_no_place_and_are_given_up(checkpoint: Path) -> None:
    """Sixty-four connections of one byte, which held every place for thirty seconds."""
    service = service_of(checkpoint, max_requests=2, limits=Limits(body_idle_s=60, body_s=600))

    async def together() -> tuple[httpx.Response, list[httpx.Response]]:
        loop = asyncio.get_running_loop()
        async with app_client(service) as http:
            held = [asyncio.create_task(http.post("/v1/poses", **slow(pause_s=6000))) for _ in range(64)]
            while service.room.bodies < 64:
                await asyncio.sleep(0.01)
            meanwhile = await http.post("/v1/poses", **form())
            assert service.room.bodies == 64
            time = loop.time
            loop.time = lambda: time() + 60  # type: ignore[method-assign]  # a minute without a byte
            return meanwhile, await asyncio.gather(*held)

    meanwhile, held = asyncio.run(together())
    assert meanwhile.status_code == 200, meanwhile.text
    assert {response.status_code for response in held} == {408}
    assert held[0].json()["type"] == "urn:hrnet:problem:slow-body"
    assert (service.room.bodies, service.room.bytes_held) == (0, 0)


def test_a_body_that_trickles_is_given_up_too(checkpoint: Path) -> None:
    service = service_of(checkpoint, limits=Limits(body_idle_s=1.0, body_s=0.3))
    response = post(service, **slow(pause_s=0.02))
    assert response.status_code == 408
    assert "within 0.3 s" in response.json()["detail"]


@pytest.mark.parametrize(
    ("settings", "sent", "reason"),
    [
        ({"max_bodies": 2}, 1, "bodies"),
        ({"max_bytes_held": 5000, "limits": Limits(max_body_bytes=4000)}, 3000, "bytes"),
    ],
)
def test_bodies_and_their_bytes_are_bounded(
    checkpoint: Path, settings: dict[str, Any], sent: int, reason: str
) -> None:
    service = service_of(checkpoint, **settings)

    async def refused() -> httpx.Response:
        async with app_client(service) as http:
            held = [asyncio.create_task(http.post("/v1/poses", **slow(bytes(sent)))) for _ in range(3)]
            (first, *_), others = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            return first.result()

    response = asyncio.run(refused())
    assert response.status_code == 429
    assert (response.json()["type"], response.json()["reason"]) == ("urn:hrnet:problem:overloaded", reason)
    assert int(response.headers["retry-after"]) >= 1
    assert (service.room.bodies, service.room.bytes_held) == (0, 0)


# --- time ---------------------------------------------------------------------------------------


def test_who_would_wait_past_the_deadline_is_told_at_once_and_others_are_answered(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of 5 s a person and a deadline of 20 s: behind three there is no time for two, behind four
    for none; who is alone is let in, whatever the network was like."""
    service = service_of(checkpoint, deadline_s=20, max_batch_people=1)
    assert service.model
    go, predict = threading.Event(), service.model.predictor.predict_crops

    def when_told(*args: Any) -> Any:
        assert go.wait(60)
        return predict(*args)

    monkeypatch.setattr(service.model.predictor, "predict_crops", when_told)
    service.room.worked(2, 10.0)

    async def together() -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with app_client(service) as http:
            asked = [asyncio.create_task(http.post("/v1/poses", **form())) for _ in range(3)]
            while service.room.people < 3:
                await asyncio.sleep(0.01)
            two = await http.post("/v1/poses", **form(boxes=[[3, 3, 20, 20], [9, 9, 20, 20]]))
            asked.append(asyncio.create_task(http.post("/v1/poses", **form())))
            while service.room.people < 4:
                await asyncio.sleep(0.01)
            late = await http.post("/v1/poses", **form())
            go.set()
            return [two, late], await asyncio.gather(*asked)

    refused, answered = asyncio.run(together())
    for response in refused:
        assert (response.status_code, response.json()["reason"]) == (429, "wait"), response.text
        assert response.headers["retry-after"] == "5"
    assert "4 people are waiting here, 20 s of work" in refused[1].json()["detail"]
    assert [response.status_code for response in answered] == [200] * 4
    assert service.room.people == 0
    service.room.worked(1, 1e6)
    assert post(service, **form()).status_code == 200


def test_seconds_a_person_are_those_of_the_last_batches(service: PoseService) -> None:
    room = Room(service.args)
    assert room.seconds_a_person == 0
    for people, seconds in ((2, 1.0), (8, 2.0)):
        room.worked(people, seconds)
    assert room.seconds_a_person == pytest.approx((0.9 * 1 + 2) / (0.9 * 2 + 8))


def test_the_network_is_timed(checkpoint: Path) -> None:
    service = service_of(checkpoint)
    assert post(service, **form()).status_code == 200
    assert 0 < service.room.seconds_a_person < 60


# --- pixels -------------------------------------------------------------------------------------


def test_pixels_are_let_in_in_order_and_given_back_by_who_gives_up() -> None:
    async def run() -> None:
        pixels, entered = Pixels(10), []

        async def work(name: str, count: int, until: asyncio.Event) -> None:
            async with pixels.take(count) as keep_only:
                entered.append(name)
                keep_only(count // 2)
                await until.wait()

        ends = {name: asyncio.Event() for name in "abcde"}
        sizes = {"a": 8, "b": 9, "c": 1, "d": 20, "e": 1}
        tasks = {}
        for name, size in sizes.items():
            tasks[name] = asyncio.create_task(work(name, size, ends[name]))
            await asyncio.sleep(0)
        assert (entered, pixels.held) == (["a"], 4), "c fits, but b was first"
        tasks["b"].cancel()
        await asyncio.gather(tasks["b"], return_exceptions=True)
        await asyncio.sleep(0)
        assert (entered, pixels.held) == (["a", "c"], 4)
        ends["a"].set()
        ends["c"].set()
        await asyncio.gather(tasks["a"], tasks["c"])
        await asyncio.sleep(0)
        assert entered == ["a", "c", "d"], "more than the limit, alone"
        ends["d"].set()
        ends["e"].set()
        await asyncio.gather(tasks["d"], tasks["e"])
        assert pixels.held == 0

    asyncio.run(run())


def test_no_room_for_pixels_is_429(checkpoint: Path) -> None:
    service = service_of(checkpoint, deadline_s=0.2, max_pixels_held=1)

    async def ask() -> httpx.Response:
        async with service.room.pixels.take(1), app_client(service) as http:
            return await http.post("/v1/poses", **form())

    response = asyncio.run(ask())
    assert response.status_code == 429
    assert response.json()["reason"] == "pixels"
    assert service.room.pixels.held == 0


def test_twelve_large_pictures_at_once_need_the_memory_of_few(checkpoint: Path) -> None:
    """Twelve of 49 Mpx took 2.8 GB more: as many are decoded at a time as max_pixels_held says."""
    service = service_of(checkpoint)
    data = bytes(cv2.imencode(".jpg", np.full((7000, 7000, 3), 99, np.uint8))[1])
    process, stop, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss)

    async def together() -> list[httpx.Response]:
        async with app_client(service) as http:
            return await asyncio.gather(*(http.post("/v1/poses", **form(data)) for _ in range(12)))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        responses = asyncio.run(together())
        stop.set()
        watching.result()
    assert [response.status_code for response in responses] == [200] * 12
    grown = (most[0] - before) / 2**20
    assert 100 < grown < 400, f"{grown:.0f} MB: one picture is 140"
    assert service.room.pixels.held == 0


# --- metrics ------------------------------------------------------------------------------------


class Shown:
    """A gauge that keeps what it is set to, by the values of its labels."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...] = ()) -> None:
        self.name, self.labels, self.values = name, labels, {}

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[tuple((tags or {})[label] for label in self.labels)] = value

    def inc(self, value: float = 1, tags: dict[str, str] | None = None) -> None:
        assert value > 0, "Ray's counters refuse 0"
        before = self.values.get(tuple((tags or {})[label] for label in self.labels), 0)
        self.set(before + value, tags)


def test_a_histogram_is_what_prometheus_own_client_makes_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.metrics.Gauge", Shown)
    ours = Sums("seconds", "Seconds.", SECONDS, ("stage",))
    theirs = Histogram("seconds", "Seconds.", ("stage",), registry=CollectorRegistry(), buckets=SECONDS)
    many = np.array([*np.random.default_rng(0).gamma(0.5, 1, 500), 0.01, 0.0, 99.0])
    for seconds in many:
        ours.observe(float(seconds), "infer")
        theirs.labels("infer").observe(seconds)
    ours.observe_all(many.reshape(-1, 1), "all")
    for seconds in many:
        theirs.labels("all").observe(seconds)
    ours.observe(1.0, "read")
    theirs.labels("read").observe(1.0)
    ours.show()
    samples = [s for metric in theirs.collect() for s in metric.samples if not s.name.endswith("_created")]
    assert len(samples) == 3 * (len(SECONDS) + 3)
    for name, labels, value, *_ in samples:
        gauge = {"seconds_bucket": ours._bucket, "seconds_sum": ours._sum, "seconds_count": ours._count}[name]
        key = tuple(labels[label] for label in gauge.labels)
        key = tuple(
            "+Inf" if one == "+Inf" else f"{float(one):g}" if one[0].isdigit() else one for one in key
        )
        assert gauge.values[key] == pytest.approx(value, rel=1e-12), (name, labels)


def test_every_gauge_is_set_with_each_health_check(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's agent drops one that was not for two of its intervals of ten seconds."""
    gauges: list[Shown] = []

    class Kept(Shown):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            gauges.append(self)

    for module in ("metrics", "model"):
        monkeypatch.setattr(f"serve.{module}.Gauge", Kept)
    service = service_of(checkpoint)
    service.live = LiveSettings(checkpoint=str(checkpoint), version="7")
    service._settle(service.live)
    assert post(service, **form(boxes=[[1, 1, 20, 20]])).status_code == 200
    service._last_success = math.inf  # no pass of the health check's own
    asyncio.run(service.check_health())
    shown = {gauge.name: dict(gauge.values) for gauge in gauges if gauge.values}
    for name in ("hrnet_model", "hrnet_deploy_failed", "hrnet_request_seconds_count", "hrnet_in_progress"):
        assert name in shown
    for gauge in gauges:
        gauge.values.clear()
    asyncio.run(service.check_health())
    assert {gauge.name: gauge.values for gauge in gauges if gauge.values} == shown


def test_a_request_is_counted_with_its_version_its_problem_and_its_reason(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.metrics.Gauge", Shown)
    monkeypatch.setattr("serve.metrics.Counter", Shown)
    service = service_of(checkpoint, max_bodies=1)
    (result,) = post(service, **form(boxes=[[1, 1, 20, 20], [1, 1, 30, 30]])).json()["results"]
    scores = [score for person in result["persons"] for _, _, score in person["keypoints"]]
    metrics = service.metrics
    metrics.show(service.room, at_once=True)
    for _ in range(3):
        with service.room.reading():
            post(service, **form())
    call(service, "GET", "/invented/by/a/stranger")
    for _ in range(2):  # what Ray was told it is not told again
        metrics.show(service.room, at_once=True)
    assert metrics.requests._counter.values == {
        ("/v1/poses", "200", "", "", "7", "float32"): 1,
        ("/v1/poses", "429", "overloaded", "", "7", "float32"): 3,
        ("other", "404", "not-found", "", "", ""): 1,
    }
    assert metrics.refused._counter.values == {("bodies", ""): 3}
    assert metrics.people._counter.values == {("7", "float32"): 2}
    assert metrics.pixels._counter.values == {("7", "float32"): 64 * 48}
    assert metrics.scores._count.values == {("7", "float32"): 2 * 17}
    assert metrics.scores._sum.values[("7", "float32")] == pytest.approx(sum(scores), rel=1e-5)
    assert metrics.seconds._count.values == {("/v1/poses", "7", "float32"): 1}
    assert {key[0] for key in metrics.stages._count.values} == {"read", "decode", "queue", "infer"}
    assert [gauge.values[()] for gauge in metrics._now.values()] == [0] * 5


# --- the log --------------------------------------------------------------------------------------


class Kept(logging.Handler):
    """The records of a logger as Serve's JSON formatter sees them: what is not the standard library's."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []
        self.flushed = 0

    def emit(self, record: logging.LogRecord) -> None:
        standard = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
        fields = {name: value for name, value in vars(record).items() if name not in standard}
        self.records.append({"said": record.getMessage(), **fields})

    def flush(self) -> None:
        self.flushed += 1


@pytest.fixture
def log() -> Iterator[Kept]:
    logger, kept = logging.getLogger("ray.serve"), Kept()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept
    logger.removeHandler(kept)
    logger.setLevel(level)


def test_a_request_is_a_line_of_the_log_with_its_id_and_without_its_picture(
    checkpoint: Path, tmp_path: Path, log: Kept
) -> None:
    (tmp_path / "keys").write_text("camera-1 0123456789abcdef-log\n")
    asked = service_of(checkpoint, keys=str(tmp_path / "keys"))
    headers = {"X-Request-ID": "abc-7", "Authorization": "Bearer 0123456789abcdef-log"}
    assert post(asked, headers=headers, **form(boxes=[[1, 2, 30, 40], [3, 4, 31, 41]])).status_code == 200
    assert post(asked, headers=headers, **form(b"secret picture")).status_code == 422
    assert (
        post(asked, headers={"Authorization": "Bearer a-wrong-key-of-someone"}, **form()).status_code == 401
    )
    assert call(asked, "GET", "/nothing/of?that=kind").status_code == 404
    assert call(asked, "GET", "/livez").status_code == 200
    good, bad, stranger, nowhere = log.records
    stages = {"read_ms", "decode_ms", "queue_ms", "infer_ms"}
    assert good.keys() == stages | {
        *("said", "status", "path", "ms", "request_id", "key", "pictures", "people", "version"),
        "log_to_stderr",
    }
    told = {
        name: good[name] for name in ("status", "path", "request_id", "key", "pictures", "people", "version")
    }
    assert told == {
        **{"status": 200, "path": "/v1/poses", "request_id": "abc-7", "key": "camera-1"},
        **{"pictures": 1, "people": 2, "version": "7"},
    }
    assert good["said"].startswith("POST /v1/poses 200 ")
    assert (bad["status"], bad["slug"], bad["key"]) == (422, "not-a-picture", "camera-1")
    assert (stranger["slug"], "key" in stranger) == ("unauthorized", False)
    assert (nowhere["path"], nowhere["status"]) == ("other", 404)
    everything = json.dumps(log.records)  # and so as JSON
    for private in ("secret", "0123456789abcdef", "wrong-key", "that=kind"):
        assert private not in everything
    assert all(len(json.dumps(record)) < 500 for record in log.records)


def test_the_log_is_written_with_the_health_checks(service: PoseService, log: Kept) -> None:
    asyncio.run(service.check_health())
    assert log.flushed == 1
