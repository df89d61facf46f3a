"""Clients that go away, too many of them, an engine that crashes, a server that is stopped."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import httpx
import pytest
from server_helpers import (
    MILLION,
    endless_stream,
    metric,
    refusal,
    repeated,
    serving,
    slow_engine,
    streamed_text,
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


def test_slow_reader_gets_the_whole_and_delays_no_one() -> None:
    """Its socket's buffers are long full when it begins to read."""
    with serving(stub_engine()) as http, connection(http, receive_buffer=4096) as slow:
        body = json.dumps({"prompt": "hello", "max_tokens": 3000, "stream": True}).encode()
        slow.sendall(post(body))
        wait_until(lambda: metric(http, "vllm:request_success_total") == 1)
        for _ in range(5):
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        answer = b""
        while b"[DONE]" not in answer[-100:]:
            answer += slow.recv(65536)
    lines = answer.decode().splitlines()
    events = [line for line in lines if line.startswith("data: ")]
    assert streamed_text(events) == repeated("hello", 3000)


def test_what_is_no_http() -> None:
    with serving(stub_engine()) as http:
        for wild in (
            bytes(range(256)) * 8 + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01",
        ):
            with connection(http) as client:
                client.sendall(wild)
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


@contextmanager
def connection(http: httpx.Client, receive_buffer: int = 65536) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect((http.base_url.host, http.base_url.port))
        yield client


def post(body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


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
    assert streamed_text(lines) == repeated("hello", 100)
