"""A server with an engine that repeats prompts, and what tests ask of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
from transformers import PreTrainedTokenizerFast

from qserve.config import ServerConfig
from qserve.engine.engine import Engine
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine
from qserve.testing.http import serve_in_thread
from qserve.testing.stub_engine import StubEngine
from qserve.testing.tiny import tiny_tokenizer

MILLION = 10**6
HELLO = [{"role": "user", "content": "hello"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": HELLO},
}


@contextmanager
def serving(
    engine: StubEngine | Engine, max_requests: int = 100, **options: Any
) -> Iterator[httpx.Client]:
    """A client of a server for the engine, known as the model "stub"; options of ServerConfig."""
    app = create_app(
        AsyncEngine(engine, max_requests), engine.tokenizer, "stub", ServerConfig(**options)
    )
    with serve_in_thread(app) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield http


@contextmanager
def serving_model(engine: Engine) -> Iterator[httpx.Client]:
    """As `serving`; no page may be lost when all clients have gone."""
    with serving(engine) as http:
        yield http
        wait_until(lambda: not engine.has_unfinished)
    engine.check_integrity()


def stub_engine(tokenizer: PreTrainedTokenizerFast | None = None, **arguments: Any) -> StubEngine:
    return StubEngine(tokenizer or tiny_tokenizer(), **arguments)


def slow_engine(**arguments: Any) -> StubEngine:
    """One that never comes to an end by itself."""
    return stub_engine(step_seconds=0.002, max_model_len=64 * MILLION, **arguments)


def openai_client(http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=str(http.base_url.join("/v1")), api_key="none", max_retries=0)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def metric(http: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response that must have this status and OpenAI's shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def repeated(text: str, num_tokens: int) -> str:
    """What the stub answers to a text of one-byte characters."""
    return (text * num_tokens)[:num_tokens]


def streamed_text(lines: Iterable[str]) -> str:
    """What the events of a completion's stream, which must have come to its end, bring together."""
    *events, end = [line.removeprefix("data: ") for line in lines if line]
    assert end == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@contextmanager
def endless_stream(http: httpx.Client) -> Iterator[Iterator[str]]:
    """A stream that runs until its context is left, which drops the connection."""
    body = {"prompt": "hello", "max_tokens": MILLION, "stream": True}
    with (
        httpx.Client(base_url=http.base_url) as other,
        other.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        yield lines
