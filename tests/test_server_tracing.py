"""Traces: a span per request, in the client's trace, with what was asked for and what it took."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi import FastAPI, Request
from server_helpers import ENDPOINTS, MILLION, slow_engine, stub_engine, wait_until

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from qserve.cli.serving import tracer_from_environment
from qserve.config import ConfigError
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine
from qserve.server.tracing import Tracing
from qserve.testing.http import serve_in_thread
from qserve.testing.stub_engine import StubEngine

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01"}


@contextmanager
def traced(engine: StubEngine) -> Iterator[tuple[httpx.Client, InMemorySpanExporter]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(AsyncEngine(engine, 10), engine.tokenizer, "stub")
    with (
        serve_in_thread(Tracing(app, provider.get_tracer("test"), "stub")) as url,
        httpx.Client(base_url=url) as http,
    ):
        yield http, exporter


def only_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    """A span ends just after its client has seen the last byte."""
    wait_until(lambda: bool(exporter.get_finished_spans()))
    (span,) = exporter.get_finished_spans()
    return span


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_span_of_a_request(path: str, streamed: bool) -> None:
    sampling = {"max_tokens": 5, "temperature": 0.5, "n": 2, "stream": streamed}
    with traced(stub_engine(step_seconds=0.005)) as (http, exporter):
        headers = {**TRACEPARENT, "X-Request-Id": "seven"}
        answer = http.post(path, json={**ENDPOINTS[path], **sampling}, headers=headers)
        span = only_span(exporter)
    assert answer.status_code == 200
    assert span.name == f"POST {path}" and span.kind is SpanKind.SERVER
    assert span.context.trace_id == TRACE and span.parent.span_id == PARENT
    found = dict(span.attributes)
    first, whole = (found.pop(f"gen_ai.latency.{x}") for x in ("time_to_first_token", "e2e"))
    assert 0 < first < whole
    assert found.pop("gen_ai.usage.prompt_tokens") > 0
    assert found == {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "gen_ai.response.model": "stub",
        "gen_ai.request.id": "seven",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.n": 2,
        "gen_ai.usage.completion_tokens": 10,
    }


def test_spans_of_refusals_and_failures() -> None:
    engine = slow_engine()
    with traced(engine) as (http, exporter):
        for path, status in (("/v1/completions", 400), ("/v1/nothing", 404)):
            assert http.post(path, json={"prompt": 5}).status_code == status
        engine.failure = RuntimeError("out of memory")
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        wait_until(lambda: len(exporter.get_finished_spans()) == 3)
        refused, unknown, failed = exporter.get_finished_spans()
    assert [s.attributes["http.response.status_code"] for s in (refused, unknown)] == [400, 404]
    assert unknown.name == "POST" and unknown.parent is None
    assert {refused.status.status_code, unknown.status.status_code} == {StatusCode.UNSET}
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["gen_ai.request.max_tokens"] == 16


def test_span_of_a_client_that_leaves() -> None:
    with traced(slow_engine()) as (http, exporter):
        body = {"prompt": "hello", "max_tokens": MILLION}
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.2)
        span = only_span(exporter)
    assert span.attributes["http.response.status_code"] == 499
    assert span.attributes["gen_ai.usage.completion_tokens"] > 0


def test_what_is_not_traced() -> None:
    with traced(stub_engine()) as (http, exporter):
        for path in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 200
        assert not exporter.get_finished_spans()


# What turns it on.


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ENDPOINT", "PROTOCOL", "TRACES_ENDPOINT", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    return monkeypatch


def test_off_unless_asked_for(environment: pytest.MonkeyPatch) -> None:
    assert tracer_from_environment() is None
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    environment.setenv("OTEL_TRACES_EXPORTER", "none")
    assert tracer_from_environment() is None


@pytest.mark.parametrize("name", ["ENDPOINT", "TRACES_ENDPOINT"])
def test_spans_are_sent_where_the_environment_says(
    environment: pytest.MonkeyPatch, name: str
) -> None:
    collector, received = FastAPI(), []

    @collector.post("/v1/traces")
    async def take(request: Request) -> None:
        received.append(ExportTraceServiceRequest.FromString(await request.body()))

    with serve_in_thread(collector) as url:
        path = "/v1/traces" if name == "TRACES_ENDPOINT" else ""
        environment.setenv(f"OTEL_EXPORTER_OTLP_{name}", url + path)
        environment.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        environment.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        tracer = tracer_from_environment()
        assert tracer is not None
        tracer.start_span("mine").end()
        tracer.span_processor.force_flush()
    (spans,) = received[0].resource_spans
    assert spans.scope_spans[0].spans[0].name == "mine"
    attributes = {a.key: a.value.string_value for a in spans.resource.attributes}
    assert attributes["service.name"] == "qserve"


def test_mistakes_are_named(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    environment.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="not by grpc"):
        tracer_from_environment()
    environment.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
    environment.setitem(sys.modules, "qserve.server.tracing", None)
    with pytest.raises(ConfigError, match=r"qserve\[tracing\]"):
        tracer_from_environment()
