"""OpenTelemetry traces of requests, as a receiver of OTLP over HTTP gets them."""

from __future__ import annotations

import asyncio
import gzip
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from test_serve import PNG, Direct, form, save_tiny, service_of
from test_serve_detector import PNG as CROWD
from test_serve_detector import crowd
from test_serve_detector import service_of as finding

from hrnet_core.errors import ConfigError
from pipelines.deploy import deploy
from pipelines.settings.config import ServeSettings
from serve.model import load_model
from serve.routes import make_app
from serve.service import PoseService
from serve.settings import ModelChoice, ServeArgs
from serve.traces import cannot

BOXES = [[1, 1, 20, 20], [1, 1, 30, 30], [5, 5, 30, 30]]
STAGES = ["read", "parse", "wait for room", "decode", "crop", "queue", "infer", "place", "encode"]
CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Receiver:
    """A collector: what is posted to /v1/traces, read by OpenTelemetry's own description of it."""

    def __init__(self) -> None:
        received: list[ExportTraceServiceRequest] = []
        self.received, self.raw = received, list[bytes]()
        raw = self.raw

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/v1/traces":
                    raw.append(body)
                    received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        every = [scope.spans for one in self.received for r in one.resource_spans for scope in r.scope_spans]
        return [span for spans in every for span in spans]

    def services(self) -> set[str]:
        """Names of what has sent them."""
        resources = [one.resource for sent in self.received for one in sent.resource_spans]
        return {attributes(resource)["service.name"] for resource in resources}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("traces") / "tiny", 0)


def attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


def asked(service: PoseService, *requests: dict[str, Any]) -> list[httpx.Response]:
    """The requests, sent at the same time; their traces are with the receiver then."""

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            sent = [http.post("/v1/poses", **request) for request in requests]
            return list(await asyncio.gather(*sent))

    answers = asyncio.run(send())
    service.traces.flush()
    return answers


def busy_between_two_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another process gets the CPU after the time of day was read and before the other clock is."""

    def time_ns() -> int:
        now = time.time_ns()
        time.sleep(0.02)
        return now

    clock = SimpleNamespace(time_ns=time_ns, perf_counter_ns=time.perf_counter_ns)
    monkeypatch.setattr("serve.traces.time", clock)


MARGIN = 1_000
"""ns: a clock in seconds has not all digits of the same in nanoseconds."""


def test_a_request_is_part_of_the_clients_trace_with_a_span_for_each_stage(
    checkpoint: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy_between_two_clocks(monkeypatch)
    service = service_of(checkpoint, traces=receiver.address)
    headers = {"traceparent": CLIENT, "x-request-id": "seen-1", "authorization": "Bearer 0123456789abcdef"}
    (answer,) = asked(service, {**form(boxes=BOXES), "headers": headers})
    assert answer.status_code == 200
    spans = {span.name: span for span in receiver.spans()}
    assert {span.trace_id.hex() for span in spans.values()} == {CLIENT.split("-")[1]}
    request = spans.pop("POST /v1/poses")
    assert request.parent_span_id.hex() == CLIENT.split("-")[2]
    assert request.kind == Span.SPAN_KIND_SERVER
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/poses",
        "http.response.status_code": 200,
        "hrnet.request_id": "seen-1",
        "hrnet.version": "7",
        "hrnet.mode": "float32",
        "hrnet.pictures": 1,
        "hrnet.people": 3,
    }
    batch = spans.pop("batch")
    assert sorted(spans) == sorted(STAGES)
    assert {span.parent_span_id for span in spans.values()} == {request.span_id}
    times = [(spans[name].start_time_unix_nano, spans[name].end_time_unix_nano) for name in STAGES]
    assert all(started <= ended for started, ended in times)
    for (_, ended), (started, _) in pairwise(times):
        assert ended <= started + MARGIN, "one after the other"
    assert request.start_time_unix_nano <= times[0][0] + MARGIN
    assert times[-1][1] <= request.end_time_unix_nano + MARGIN
    # What was asked with is in none of them, and who asked neither.
    sent = b"".join(receiver.raw)
    assert PNG[:60] not in sent
    assert b"0123456789abcdef" not in sent
    assert [link.span_id for link in spans["infer"].links] == [batch.span_id]
    assert receiver.services() == {"hrnet"}


def test_finding_people_is_a_stage_between_decoding_and_cutting(
    checkpoint: Path, receiver: Receiver, tmp_path: Path
) -> None:
    service = finding(checkpoint, crowd(tmp_path), traces=receiver.address)
    (answer,) = asked(service, {"files": [("image", CROWD)]})
    assert len(answer.json()["results"][0]["persons"]) == 3
    spans = {span.name: span for span in receiver.spans()}
    seen, found, cut = (spans[name] for name in ("decode", "detect", "crop"))
    assert seen.end_time_unix_nano <= found.start_time_unix_nano + MARGIN
    assert found.end_time_unix_nano <= cut.start_time_unix_nano + MARGIN


class Together(Direct):
    """The batches of the service without Serve: both requests' people in one."""

    waiting: list[tuple[Any, asyncio.Future[Any]]]

    async def _infer_portion(self, portion: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((portion, future))
        if len(self.waiting) == 2:
            for (_, one), found in zip(
                self.waiting, await self._infer([p for p, _ in self.waiting]), strict=True
            ):
                one.set_result(found)
        return await future


def test_a_batch_links_to_the_requests_that_are_in_it(checkpoint: Path, receiver: Receiver) -> None:
    args = ServeArgs(checkpoint=str(checkpoint), version="7", traces=receiver.address)
    service = Together(args, make_app)
    service.waiting = []
    service.model = load_model(ModelChoice(checkpoint=args.checkpoint, version="7"), args)
    answers = asked(service, form(boxes=BOXES), form(boxes=BOXES[:2]))
    assert [answer.status_code for answer in answers] == [200, 200]
    spans = receiver.spans()
    requests = [span for span in spans if span.name == "POST /v1/poses"]
    assert len({span.trace_id for span in requests}) == 2
    (batch,) = [span for span in spans if span.name == "batch"]
    assert {link.span_id for link in batch.links} == {span.span_id for span in requests}
    assert batch.parent_span_id in {span.span_id for span in requests}
    assert attributes(batch) == {"hrnet.people": 5, "hrnet.requests": 2}
    infers = [span for span in spans if span.name == "infer"]
    assert [[link.span_id for link in span.links] for span in infers] == [[batch.span_id]] * 2


def test_what_is_refused_says_why_and_probes_say_nothing(checkpoint: Path, receiver: Receiver) -> None:
    service = service_of(checkpoint, traces=receiver.address)
    asked(service, form(b"no picture: my secret"))

    async def probe() -> int:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return (await http.get("/readyz")).status_code

    assert asyncio.run(probe()) == 200
    service.traces.flush()
    spans = {span.name: span for span in receiver.spans()}
    assert sorted(spans) == ["POST /v1/poses", "parse", "read"]
    request = attributes(spans["POST /v1/poses"])
    assert (request["http.response.status_code"], request["hrnet.slug"]) == (422, "not-a-picture")
    assert spans["POST /v1/poses"].status.code == Status.STATUS_CODE_UNSET, "the client's mistake, not ours"
    assert b"my secret" not in b"".join(receiver.raw)


def test_a_defect_is_an_error_and_its_words_stay_here(
    checkpoint: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(checkpoint, traces=receiver.address)

    def broken(*_: Any) -> Any:
        raise RuntimeError("with a word of the client")

    monkeypatch.setattr(service.model.predictor, "finish", broken)
    (answer,) = asked(service, form(boxes=BOXES))
    assert answer.status_code == 500
    spans = {span.name: span for span in receiver.spans()}
    assert spans["POST /v1/poses"].status.code == Status.STATUS_CODE_ERROR
    assert attributes(spans["place"]) == {"error.type": "RuntimeError"}
    assert b"word of the client" not in b"".join(receiver.raw)


def test_a_client_that_does_not_want_to_be_traced_is_not(checkpoint: Path, receiver: Receiver) -> None:
    service = service_of(checkpoint, traces=receiver.address)
    (answer,) = asked(service, {**form(boxes=BOXES), "headers": {"traceparent": CLIENT[:-2] + "00"}})
    assert answer.status_code == 200
    assert receiver.spans() == []


def test_opentelemetrys_own_variables_are_heard(
    checkpoint: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.address)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "poses-of-the-yard")
    asked(service_of(checkpoint), form(boxes=BOXES))
    assert len(receiver.spans()) == len(STAGES) + 2
    assert receiver.services() == {"poses-of-the-yard"}
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    asked(service_of(checkpoint), form(boxes=BOXES))
    assert len(receiver.spans()) == len(STAGES) + 2


def test_a_receiver_that_is_away_costs_no_answer_and_no_end(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.traces.END_S", 0.05)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        service = service_of(checkpoint, traces=f"http://127.0.0.1:{nobody.getsockname()[1]}")

        async def send() -> int:
            transport = httpx.ASGITransport(make_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                return (await http.post("/v1/poses", **form(boxes=BOXES))).status_code

        assert asyncio.run(send()) == 200
        service.traces.close()


ENDING = """
from serve import service
service.kept = service.PoseService.__new__(service.PoseService)  # until the modules themselves go
service.kept.traces = service.Traces("http://127.0.0.1:9")
"""


def test_a_process_that_ends_says_nothing_of_it() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


OFF = """
import sys
from serve.traces import Traces, UNTRACED
traces = Traces(None)
spans = traces.began("POST", {}, "1")
assert spans is UNTRACED
with spans.stage("read"):
    pass
spans.add("infer", 1.0, 2.0)
with traces.batch([None], 3) as batch:
    assert batch is None
spans.answered("POST", "/v1/poses", 200, {"people": 3})
spans.end()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_where_they_are_off_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_what_cannot_be_sent_is_said_before_anything_starts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cannot(None) == ""
    assert cannot("http://127.0.0.1:4318") == ""
    with pytest.raises(ConfigError, match="collector:4317: traces go by OTLP over HTTP"):
        deploy(str(checkpoint), ServeSettings(traces="collector:4317"), block=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "hrnet-ray[traces]" in cannot("http://127.0.0.1:4318")
