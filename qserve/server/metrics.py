"""Prometheus metrics; those that mean what a metric of vLLM means carry its name."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qserve.engine.engine import EngineStats
from qserve.engine.request import RequestOutput
from qserve.server.shared_engine import SharedEngine, StepTotals

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = tuple(2.0**power for power in range(18))

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_running": ("Sequences that are computed.", lambda s: s.running),
    "vllm:num_requests_waiting": ("Sequences that wait to be computed.", lambda s: s.waiting),
    "vllm:kv_cache_usage_perc": (
        "Share of the KV cache's pages in use; 1 is all of them.",
        lambda s: s.pages_used / max(1, s.pages_total),
    ),
    "qserve:kv_cache_pages": ("Pages of the KV cache.", lambda s: s.pages_total),
}
_STEP_COUNTERS: dict[str, tuple[str, Callable[[StepTotals], float]]] = {
    "qserve:engine_steps": ("Steps of the engine.", lambda t: t.steps),
    "qserve:engine_step_seconds": ("Seconds spent in steps.", lambda t: t.seconds),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:prompt_tokens": ("Prompt tokens of admitted requests.", lambda s: s.prompt_tokens),
    "vllm:generation_tokens": ("Tokens generated.", lambda s: s.generated_tokens),
    "vllm:prefix_cache_queries": ("Tokens looked up for reuse.", lambda s: s.prompt_tokens),
    "vllm:prefix_cache_hits": ("Prompt tokens reused.", lambda s: s.cached_tokens),
    "vllm:num_preemptions": ("Sequences that gave up their pages.", lambda s: s.preemptions),
}


class _EngineCollector:
    """Reads the engine's state when it is asked for."""

    def __init__(self, engine: SharedEngine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats, steps = self._engine.stats, self._engine.step_totals
        for name, (meaning, value) in _GAUGES.items():
            yield self._metric(GaugeMetricFamily, name, meaning, value(stats))
        for name, (meaning, value) in _COUNTERS.items():
            yield self._metric(CounterMetricFamily, name, meaning, value(stats))
        for name, (meaning, total) in _STEP_COUNTERS.items():
            yield self._metric(CounterMetricFamily, name, meaning, total(steps))

    def _metric(self, family: type[Metric], name: str, meaning: str, value: float) -> Metric:
        metric = family(name, meaning, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: SharedEngine, model: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model))
        self._model = model
        self._finished = Counter(
            "vllm:request_success",
            "Sequences that finished.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _LATENCY
        )
        self._token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a request.",
            _TOKEN_LATENCY,
        )
        self._request = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY
        )
        self._prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS
        )
        self._generated_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        text: bytes = generate_latest(self.registry)
        return text

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            name, meaning, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model)

    def stopwatch(self) -> Stopwatch:
        """To be taken when a request arrives."""
        return Stopwatch(self)

    def record(self, output: RequestOutput, arrival: float, first: float, tokens: int) -> None:
        """Take note of a request that ends with `output`; times are of the monotonic clock."""
        now = time.monotonic()
        self._request.observe(now - arrival)
        self._prompt_tokens.observe(output.prompt_tokens)
        self._generated_tokens.observe(tokens)
        if tokens > 1:
            self._token.observe((now - first) / (tokens - 1))

    def record_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def record_end(self, reason: str) -> None:
        self._finished.labels(self._model, reason).inc()


class Stopwatch:
    """Times the engine's requests behind one HTTP request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.monotonic()
        self._first: dict[str, float] = {}
        self._tokens: dict[str, int] = defaultdict(int)

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival to the first token of all."""
        return min(self._first.values()) - self._arrival if self._first else None

    def take(self, output: RequestOutput) -> None:
        request_id = output.request_id
        if request_id not in self._first:
            self._first[request_id] = time.monotonic()
            self._metrics.record_first_token(self._first[request_id] - self._arrival)
        for part in output.outputs:
            self._tokens[request_id] += len(part.token_ids)
            if part.finish_reason is not None:
                self._metrics.record_end(part.finish_reason.value)
        if output.finished:
            first, tokens = self._first[request_id], self._tokens[request_id]
            self._metrics.record(output, self._arrival, first, tokens)
