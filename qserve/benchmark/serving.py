"""A server under load: requests that arrive over time, and how long their tokens take to come."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy

PERCENTILES = (50, 90, 99)
_VOCABULARY = 256
"""Prompts are made of token ids below this, which every vocabulary has."""


@dataclass(frozen=True)
class Arrival:
    """A request: seconds after the start, tokens of its prompt, tokens to generate."""

    at: float
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        if self.at < 0 or self.input_len < 1 or self.output_len < 1:
            raise ValueError(f"{self} must lie in the future and have tokens")


@dataclass(frozen=True)
class Objectives:
    """What a request must keep to count as good: milliseconds, None for any."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met_by(self, answer: Answer) -> bool:
        """Whether an answer came in time."""
        return (self.ttft_ms is None or answer.ttft * 1e3 <= self.ttft_ms) and (
            self.tpot_ms is None or answer.tpot * 1e3 <= self.tpot_ms
        )


@dataclass
class Answer:
    """What came of a request; seconds. events: when each streamed event with text arrived.

    error: why it failed, or None.
    """

    sent: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """To the first token."""
        return self.events[0] - self.sent

    @property
    def tpot(self) -> float:
        """Per token after the first, on average."""
        return (self.events[-1] - self.events[0]) / max(self.tokens - 1, 1)

    @property
    def latency(self) -> float:
        """To the last token."""
        return self.events[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between events."""
        return [after - before for before, after in pairwise(self.events)]


@dataclass(frozen=True)
class ServingReport:
    """One run; milliseconds by percentile. rate: requests/s offered, None for a trace.

    goodput: requests/s that met the objectives. errors: message -> how often.
    """

    rate: float | None
    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    goodput: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    itl_ms: dict[str, float]
    latency_ms: dict[str, float]
    errors: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        offered = "trace" if self.rate is None else f"{self.rate:g} requests/s offered"
        lines = [
            f"{offered}: {self.requests} requests in {self.seconds:.1f} s, {self.failed} failed",
            f"  {self.requests_per_second:.2f} requests/s, of which good {self.goodput:.2f}; "
            f"{self.output_tokens_per_second:,.1f} output tokens/s",
        ]
        for name in ("ttft", "tpot", "itl", "latency"):
            values: dict[str, float] = getattr(self, f"{name}_ms")
            numbers = "  ".join(f"{key} {value:9.1f}" for key, value in values.items())
            lines.append(f"  {name:8s} ms  {numbers}")
        lines += [f"  {count} x {message}" for message, count in self.errors.items()]
        return "\n".join(lines)


def poisson_arrivals(
    rate: float, count: int, input_len: int, output_len: int, seed: int
) -> list[Arrival]:
    """`count` requests, `rate` a second on average, at exponential intervals; the first at once."""
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate!r}")
    generator = random.Random(seed)
    arrivals, at = [], 0.0
    for _ in range(count):
        arrivals.append(Arrival(at, input_len, output_len))
        at += generator.expovariate(rate)
    return arrivals


def read_trace(path: Path) -> list[Arrival]:
    """A JSON object a line: timestamp in seconds, input_len, output_len; the earliest is at zero."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append((float(row["timestamp"]), int(row["input_len"]), int(row["output_len"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: not an object of timestamp, input_len and output_len"
            ) from error
    if not rows:
        raise ValueError(f"{path} holds no requests")
    start = min(rows)[0]
    return [
        Arrival(at - start, input_len, output_len) for at, input_len, output_len in sorted(rows)
    ]


def bench_serving(
    url: str,
    arrivals: Sequence[Arrival],
    objectives: Objectives,
    seed: int = 0,
    rate: float | None = None,
    api_key: str | None = None,
) -> ServingReport:
    """Send greedy completions of random prompts to an OpenAI server, such as http://host:8000.

    The same seed sends the same prompts. Raises ValueError if there is no such server.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    model = _served_model(url, headers)
    start = time.perf_counter()
    answers = asyncio.run(_send_all(url, headers, model, arrivals, seed))
    return _report(answers, objectives, time.perf_counter() - start, rate)


def _served_model(url: str, headers: dict[str, str]) -> str:
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30).raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        raise ValueError(f"{url} is no OpenAI server: {error or type(error).__name__}") from error


async def _send_all(
    url: str, headers: dict[str, str], model: str, arrivals: Sequence[Arrival], seed: int
) -> list[Answer]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=None, limits=limits
    ) as client:
        start = time.perf_counter()
        bodies = (_body(model, arrival, seed, i) for i, arrival in enumerate(arrivals))
        return await asyncio.gather(
            *(
                _send(client, start + arrival.at, body)
                for arrival, body in zip(arrivals, bodies, strict=True)
            )
        )


def _body(model: str, arrival: Arrival, seed: int, index: int) -> dict[str, Any]:
    """Prompts are drawn each by itself, so that none depends on how many there are."""
    prompt = random.Random(f"{seed}/{index}").choices(range(_VOCABULARY), k=arrival.input_len)
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": arrival.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _send(client: httpx.AsyncClient, at: float, body: dict[str, Any]) -> Answer:
    await asyncio.sleep(max(0.0, at - time.perf_counter()))
    answer = Answer(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                answer.error = f"status {response.status_code}"
                return answer
            async for line in response.aiter_lines():
                _take(answer, line)
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    if answer.error is None and (answer.tokens != body["max_tokens"] or not answer.events):
        answer.error = "fewer tokens than asked for"
    return answer


def _take(answer: Answer, line: str) -> None:
    """A line of a stream of server-sent events."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        answer.error = str(event["error"].get("message", "error"))
    if event.get("choices"):
        answer.events.append(time.perf_counter())
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]


def _report(
    answers: Iterable[Answer], objectives: Objectives, seconds: float, rate: float | None
) -> ServingReport:
    answers = list(answers)
    whole = [answer for answer in answers if answer.error is None]
    messages = [answer.error for answer in answers if answer.error is not None]
    return ServingReport(
        rate=rate,
        requests=len(answers),
        failed=len(messages),
        seconds=seconds,
        requests_per_second=len(whole) / seconds,
        output_tokens_per_second=sum(answer.tokens for answer in whole) / seconds,
        goodput=sum(map(objectives.met_by, whole)) / seconds,
        ttft_ms=percentiles(answer.ttft for answer in whole),
        tpot_ms=percentiles(answer.tpot for answer in whole if answer.tokens > 1),
        itl_ms=percentiles(gap for answer in whole for gap in answer.gaps),
        latency_ms=percentiles(answer.latency for answer in whole),
        errors={message: messages.count(message) for message in dict.fromkeys(messages)},
    )


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Milliseconds: mean, p50, p90 and p99, interpolated; empty for no values."""
    values = [1e3 * value for value in seconds]
    if not values:
        return {}
    ranks = numpy.percentile(values, PERCENTILES)
    named = {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, ranks, strict=True)}
    return {"mean": float(numpy.mean(values)), **named}
