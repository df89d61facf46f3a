"""Clients that go away, too many of them, an engine that crashes, a server that is stopped."""

from __future__ import annotations

import json
from threading import Thread

import httpx
import pytest
from server_helpers import (
    MILLION,
    endless_stream,
    metric,
    refusal,
    serving,
    slow_engine,
    stub_engine,
    wait_until,
)


def test_disconnect_in_mid_stream_frees_pages() -> None:
    engine = slow_engine()
    with serving(engine) as http:
        with endless_stream(http):
            assert metric(http, "vllm:num_requests_running") == 1
            assert metric(http, "vllm:kv_cache_usage_perc") > 0
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)
        assert metric(http, "vllm:kv_cache_usage_perc") == 0
        assert not engine.has_unfinished


def test_disconnect_before_the_answer_frees_pages() -> None:
    engine = slow_engine()
    with serving(engine) as http:
        body = {"prompt": "hello", "max_tokens": MILLION}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(http.base_url.join("/v1/completions"), json=body, timeout=0.2)
        wait_until(lambda: not engine.has_unfinished)
        assert metric(http, "vllm:kv_cache_usage_perc") == 0


def test_disconnect_of_one_who_waits() -> None:
    """No token has come yet that could fail to be sent."""
    with serving(slow_engine(max_running=1)) as http, endless_stream(http) as lines:
        body = {"prompt": "hello", "stream": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(http.base_url.join("/v1/completions"), json=body, timeout=0.2)
        wait_until(lambda: metric(http, "vllm:num_requests_waiting") == 0)
        assert metric(http, "vllm:num_requests_running") == 1
        assert next(line for line in lines if line)


def test_full_queue() -> None:
    with serving(slow_engine(), max_requests=2) as http:
        with endless_stream(http), endless_stream(http):
            response = http.post("/v1/completions", json={"prompt": "x"})
            assert refusal(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) > 0
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_crash_of_the_engine_reaches_everyone() -> None:
    engine = slow_engine()
    with serving(engine) as http, endless_stream(http) as lines:
        answers: list[httpx.Response] = []
        body = {"prompt": "hello", "max_tokens": MILLION}
        whole = Thread(target=lambda: answers.append(http.post("/v1/completions", json=body)))
        whole.start()
        wait_until(lambda: engine.stats.running == 2)
        engine.failure = RuntimeError("out of memory")
        events = [line for line in lines if line]
        assert "out of memory" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
        whole.join()
        assert "out of memory" in refusal(answers[0], 500)["message"]
        assert "out of memory" in refusal(http.get("/health"), 503)["message"]
        refusal(http.post("/v1/completions", json=body), 500)
        assert http.get("/metrics").status_code == 200


def test_shutdown_lets_requests_finish() -> None:
    engine = stub_engine(step_seconds=0.005)
    lines: list[str] = []
    with serving(engine) as http:
        other = httpx.Client(base_url=http.base_url)
        body = {"prompt": "hello", "max_tokens": 100, "stream": True}
        started = other.send(other.build_request("POST", "/v1/completions", json=body), stream=True)
        reader = Thread(target=lambda: lines.extend(line for line in started.iter_lines() if line))
        reader.start()
        wait_until(lambda: bool(lines))
    reader.join()
    other.close()
    assert len(lines) == 101 and lines[-1] == "data: [DONE]"
