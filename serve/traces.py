"""OpenTelemetry traces of requests. Off unless something takes them, and then nothing of it is imported.

Serve's own tracing (RAY_SERVE_TRACING_*) is one span for a request and a hop, samples by a variable of its
own and knows no stages and no batches. Where it is on, its span is the parent of ours.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's variables: where one is set in the environment of a replica, traces go there."""
NOTHING: AbstractContextManager[None] = nullcontext()
SERVICE = "hrnet"
END_S = 2.0


def cannot(endpoint: str | None) -> str:
    """Why traces that are asked for, by setting or environment, cannot be sent from here; else ""."""
    if not (endpoint or _by_environment()):
        return ""
    if endpoint and not endpoint.startswith(("http://", "https://")):
        return f"{endpoint}: traces go by OTLP over HTTP, to an address such as http://127.0.0.1:4318"
    try:
        there = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        there = None
    return "" if there else "OpenTelemetry's exporter is not installed: pip install 'hrnet-ray[traces]'"


def _by_environment() -> bool:
    return any(os.environ.get(name) for name in ENDPOINTS)


class Spans:
    """The spans of one request, below the one that stands for the whole of it. None where traces are off:
    then all of this does nothing."""

    def __init__(self, tracer: Tracer | None = None, span: Span | None = None, zero: int = 0) -> None:
        """zero: the time of day, in nanoseconds, when time.perf_counter_ns was 0. All spans are timed by that
        one clock: those of what a thread did, told later, then lie where they belong among the others."""
        self._tracer, self._span, self._zero = tracer, span, zero
        self._below: Context | None = None
        if span is not None:
            from opentelemetry.trace import set_span_in_context

            self._below = set_span_in_context(span)

    @property
    def context(self) -> SpanContext | None:
        """Of the request, if it is kept (sampled)."""
        context = self._span.get_span_context() if self._span else None
        return context if context is not None and context.trace_flags.sampled else None

    @property
    def trace_id(self) -> str:
        """32 hex digits; "" where the request is not kept."""
        return f"{self.context.trace_id:032x}" if self.context else ""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A span around a block."""
        return NOTHING if self._tracer is None else self._stage(name)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        assert self._tracer
        span = self._tracer.start_span(name, self._below, start_time=self._now())
        try:
            yield
        except BaseException as error:
            # Its text may hold words of the client.
            span.set_attribute("error.type", getattr(error, "slug", "") or type(error).__name__)
            raise
        finally:
            span.end(self._now())

    def _now(self) -> int:
        return self._zero + time.perf_counter_ns()

    def add(self, name: str, started: float, ended: float, links: Sequence[SpanContext] = ()) -> None:
        """A span of what is over: its times by time.perf_counter, and the batches that it was in."""
        if self._tracer is None or ended < started:
            return
        from opentelemetry.trace import Link

        times = [self._zero + int(1e9 * at) for at in (started, ended)]
        linked = [Link(context) for context in links]
        self._tracer.start_span(name, self._below, links=linked, start_time=times[0]).end(times[1])

    def answered(self, method: str, route: str, status: int, told: Mapping[str, Any]) -> None:
        """What became of the request. told: attributes beside these, without "hrnet."."""
        if self._span is None or not self._span.is_recording():
            return
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {route}")
        attributes = {f"hrnet.{name}": value for name, value in told.items()}
        self._span.set_attributes({**attributes, "http.route": route, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        if self._span is not None:
            self._span.end(self._now())


UNTRACED = Spans()


def spans_of(request: Any) -> Spans:
    """Those that were begun for a request; none where nothing has begun any."""
    spans: Spans = getattr(request.state, "spans", UNTRACED)
    return spans


class Traces:
    """What starts the spans of a replica. endpoint: of the setting; None: the environment decides."""

    def __init__(self, endpoint: str | None) -> None:
        wanted = (endpoint or _by_environment()) and not cannot(endpoint)
        self._provider = _provider(endpoint) if wanted else None
        self._tracer = self._provider.get_tracer(SERVICE) if self._provider else None
        self._end = weakref.finalize(self, _end, self._provider)
        self._end.atexit = False  # a provider ends with its process by itself

    def began(self, method: str, headers: Mapping[str, str], request_id: str) -> Spans:
        """The spans of a request: part of the client's trace where it sends `traceparent`."""
        if self._tracer is None:
            return UNTRACED
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = None
        if not trace.get_current_span().get_span_context().is_valid:
            parent = TraceContextTextMapPropagator().extract(headers)
        told = {"http.request.method": method, "hrnet.request_id": request_id}
        zero, now = time.time_ns() - time.perf_counter_ns(), time.perf_counter_ns()
        span = self._tracer.start_span(method, parent, trace.SpanKind.SERVER, told, start_time=zero + now)
        return Spans(self._tracer, span, zero)

    @contextmanager
    def batch(self, requests: Sequence[SpanContext | None], people: int) -> Iterator[SpanContext | None]:
        """A span around a batch; what is given is its own context. It stands in the trace of the first of its
        requests that is kept, and links to all of them."""
        kept = list({one.span_id: one for one in requests if one is not None}.values())
        if self._tracer is None or not kept:
            yield None
            return
        from opentelemetry.trace import Link, NonRecordingSpan, set_span_in_context

        first = set_span_in_context(NonRecordingSpan(kept[0]))
        told = {"hrnet.people": people, "hrnet.requests": len(kept)}
        span = self._tracer.start_span("batch", first, attributes=told, links=[Link(one) for one in kept])
        try:
            yield span.get_span_context()
        finally:
            span.end()

    def flush(self) -> None:
        """Send what is kept back; returns when that is done, or has failed."""
        if self._provider:
            self._provider.force_flush()

    def close(self) -> None:
        """Send what is kept back and end; a receiver that is away does not hold up a replica that ends. Does
        nothing a second time, or while the interpreter goes."""
        self._end()


def _end(provider: Any) -> None:
    if provider:
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(END_S)


def _provider(endpoint: str | None) -> Any:
    """Set up by OpenTelemetry's variables: sampler, headers, timeouts, resource. Not the process's own, which
    Serve's tracing may want."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
    provider = TracerProvider(resource=resource)
    address = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return provider
