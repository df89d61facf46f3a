"""A span of OpenTelemetry per request; its attributes are named as vLLM names its own."""

from __future__ import annotations

import time
from typing import Any

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qserve.engine.request import SamplingParams
from qserve.server.errors import CLIENT_CLOSED_REQUEST
from qserve.server.middleware import PROTECTED_PATHS, RequestRecord


def otlp_tracer() -> Tracer:
    """One that sends spans where the OTEL_* variables say, over HTTP, on a thread of its own."""
    resource = Resource({SERVICE_NAME: "qserve"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("qserve")


class Tracing:
    """Surrounds an application: a span for each request to the API, from arrival to the last byte.

    It continues the trace that the client's `traceparent` names.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, model: str) -> None:
        self._app = app
        self._tracer = tracer
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PROTECTED_PATHS):
            await self._app(scope, receive, send)
            return
        parent = propagate.extract(Headers(scope=scope))
        with self._tracer.start_as_current_span(scope["method"], parent, SpanKind.SERVER) as span:
            await self._app(scope, receive, send)
            self._describe(span, scope)

    def _describe(self, span: Span, scope: Scope) -> None:
        record: RequestRecord = scope["state"]["record"]
        status = record.status or CLIENT_CLOSED_REQUEST
        if "route" in scope:
            span.update_name(f"{scope['method']} {scope['route'].path}")
            span.set_attribute("http.route", scope["route"].path)
        span.set_attribute("http.request.method", scope["method"])
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        if record.params is not None:
            span.set_attribute("gen_ai.response.model", self._model)
            span.set_attributes(_generation(record, record.params))


def _generation(record: RequestRecord, params: SamplingParams) -> dict[str, Any]:
    first = record.stopwatch.first_token_seconds if record.stopwatch else None
    found = {
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": params.n,
        "gen_ai.usage.prompt_tokens": record.usage.prompt_tokens if record.usage else None,
        "gen_ai.usage.completion_tokens": record.usage.completion_tokens if record.usage else None,
        "gen_ai.latency.time_to_first_token": first,
        "gen_ai.latency.e2e": time.monotonic() - record.arrival,
    }
    return {name: value for name, value in found.items() if value is not None}
