"""What those who run a server rely on: limits, keys, ids, logs, TLS, and a clean end."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from fastapi import FastAPI
from server_helpers import (
    ENDPOINTS,
    HELLO,
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

from qserve.cli.serving import read_api_keys
from qserve.config import ConfigError, ServerConfig
from qserve.server.middleware import BodyLimit, RequestContext, request_logger
from qserve.testing.http import serve_in_thread

endpoints = pytest.mark.parametrize("path", ENDPOINTS)


# Limits.


def test_body_limit() -> None:
    with serving(stub_engine(), max_body_bytes=1000) as http:
        longest = json.dumps({"prompt": "x"}).ljust(1000)
        headers = {"content-type": "application/json"}
        for content, status in ((longest, 200), (longest + " ", 413), ("x" * 10 * MILLION, 413)):
            response = http.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == status
        assert "1000 bytes" in refusal(response, 413)["message"]
        chunks = (b" " * 600 for _ in range(2))  # of a length that is not announced
        refusal(http.post("/v1/completions", content=chunks, headers=headers), 413)


def test_body_that_does_not_come() -> None:
    app = FastAPI()
    app.add_middleware(BodyLimit, max_bytes=100, max_seconds=0.1)
    with serve_in_thread(app) as url, half_a_body(url) as connection:
        answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"timeout_error" in answer
        while connection.recv(10_000):
            pass  # the rest of the answer, then the end of the connection


def test_half_a_body_disturbs_no_one() -> None:
    with serving(stub_engine()) as http:
        with half_a_body(str(http.base_url)):
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


@contextmanager
def half_a_body(url: str) -> Iterator[socket.socket]:
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 50\r\n\r\n{"prompt": '
        )
        yield connection


@endpoints
def test_request_timeout(path: str) -> None:
    engine = slow_engine()
    with serving(engine, request_timeout=0.2) as http:
        body = {**ENDPOINTS[path], "max_tokens": MILLION}
        error = refusal(http.post(path, json=body), 504)
        assert error["type"] == "timeout_error" and "0.2 seconds" in error["message"]
        *_, last = http.post(path, json={**body, "stream": True}).text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"] == error
        wait_until(lambda: not engine.has_unfinished)
        assert http.post(path, json={**ENDPOINTS[path], "max_tokens": 3}).status_code == 200


def test_more_prompts_than_are_ever_taken_on() -> None:
    """To try again later would be of no use."""
    with serving(stub_engine(), max_requests=3) as http:
        assert http.post("/v1/completions", json={"prompt": ["x"] * 3}).status_code == 200
        error = refusal(http.post("/v1/completions", json={"prompt": ["x"] * 4}), 400)
        assert error["param"] == "prompt" and "4 sequences" in error["message"]


@endpoints
def test_choices_count_as_requests(path: str) -> None:
    with serving(slow_engine(), max_requests=4) as http:
        assert http.post(path, json={**ENDPOINTS[path], "n": 4, "max_tokens": 2}).status_code == 200
        error = refusal(http.post(path, json={**ENDPOINTS[path], "n": 5}), 400)
        assert error["param"] == "n" and "5 sequences" in error["message"]
        with endless_stream(http):
            refusal(http.post(path, json={**ENDPOINTS[path], "n": 4}), 429)
            answer = http.post(path, json={**ENDPOINTS[path], "n": 3, "max_tokens": 2})
            assert answer.status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"max_requests": 0},
        {"max_body_bytes": 0},
        {"request_timeout": 0.0},
        {"request_timeout": float("nan")},
        {"api_keys": ("",)},
        {"tls_key": Path("key.pem")},
    ],
    ids=str,
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerConfig(**wrong)


# Keys and origins.


@endpoints
def test_api_keys(path: str) -> None:
    with serving(stub_engine(), api_keys=("first", "second")) as http:
        for key in ("first", "second"):
            headers = {"Authorization": f"Bearer {key}"}
            assert http.post(path, json=ENDPOINTS[path], headers=headers).status_code == 200
        for value in ("Bearer third", "Bearer firs", "Bearer", "first", "Basic first", ""):
            response = http.post(path, json=ENDPOINTS[path], headers={"Authorization": value})
            assert refusal(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        refusal(http.post(path, content=b"{", headers={"content-type": "application/json"}), 401)


def test_what_needs_no_key() -> None:
    with serving(stub_engine(), api_keys=("secret",)) as http:
        refusal(http.get("/v1/models"), 401)
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 200


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(ServerConfig(api_keys=("secret",)))


def test_keys_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QSERVE_API_KEY", raising=False)
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n")
    assert read_api_keys(None) == ()
    assert read_api_keys(path) == ("one", "two")
    monkeypatch.setenv("QSERVE_API_KEY", "three")
    assert read_api_keys(path) == ("one", "two", "three")
    assert read_api_keys(None) == ("three",)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_api_keys(path)


def test_cors() -> None:
    site, other = "https://site.example", "https://other.example"
    with serving(stub_engine(), cors_origins=(site,), api_keys=("secret",)) as http:
        asked = {"Access-Control-Request-Method": "POST"}
        for origin, allowed in ((site, site), (other, None)):
            headers = {"Origin": origin, **asked}
            preflight = http.options("/v1/chat/completions", headers=headers)
            assert preflight.headers.get("access-control-allow-origin") == allowed
            answer = http.post("/v1/chat/completions", json={}, headers={"Origin": origin})
            assert refusal(answer, 401)
            assert answer.headers.get("access-control-allow-origin") == allowed
    with serving(stub_engine()) as http:
        answer = http.get("/health", headers={"Origin": site})
        assert "access-control-allow-origin" not in answer.headers


# Ids and logs.


def test_request_ids() -> None:
    with serving(stub_engine()) as http:
        given = {"X-Request-Id": "trace-1.a:b_c"}
        assert http.get("/health", headers=given).headers["x-request-id"] == "trace-1.a:b_c"
        own = [http.get("/nothing").headers["x-request-id"] for _ in "ab"]
        assert own[0] != own[1] and all(re.fullmatch("[0-9a-f]{32}", i) for i in own)
        for unsound in ("a b", "x" * 129, '"', ""):
            answer = http.get("/health", headers={"X-Request-Id": unsound})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_unexpected_error_has_an_id_and_openais_shape(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    app.add_middleware(RequestContext)

    @app.get("/")
    def fail() -> None:
        raise ZeroDivisionError("private")

    with serve_in_thread(app) as url:
        answer = httpx.get(url, headers={"X-Request-Id": "seven"})
    assert refusal(answer, 500)["message"] == "internal error: ZeroDivisionError"
    assert answer.headers["x-request-id"] == "seven"
    assert "request seven failed" in caplog.text and "private" in caplog.text


def test_log_has_a_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, request_logger.name)
    with serving(stub_engine(), api_keys=("secret",)) as http:
        http.headers["Authorization"] = "Bearer secret"
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
        body = {"prompt": "ab", "max_tokens": 4, "stream": True}
        http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
        http.post("/v1/completions", json={"prompt": 7})
        http.get("/v1/models", headers={"Authorization": "Bearer wrong"})
    lines = [json.loads(r.message) for r in caplog.records if r.name == request_logger.name]
    assert [line["status"] for line in lines] == [200, 200, 400, 401]
    tokens = [(x["prompt_tokens"], x["cached_tokens"], x["completion_tokens"]) for x in lines[:2]]
    assert tokens == [(3, 0, 5), (2, 0, 4)]
    assert all(set(line) == set(lines[0]) - _TOKENS for line in lines[2:])
    assert lines[1]["request_id"] == "mine" and lines[1]["path"] == "/v1/completions"
    assert [line["method"] for line in lines] == ["POST"] * 3 + ["GET"]
    assert all(line["seconds"] > 0 and line["client"] == "127.0.0.1" for line in lines)
    assert "secret" not in caplog.text


_TOKENS = {"prompt_tokens", "cached_tokens", "completion_tokens"}


def test_log_of_a_client_that_leaves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, request_logger.name)
    with serving(slow_engine()) as http, pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "hello", "max_tokens": MILLION}
        httpx.post(http.base_url.join("/v1/completions"), json=body, timeout=0.2)
    (line,) = [json.loads(r.message) for r in caplog.records if r.name == request_logger.name]
    assert line["status"] == 499 and line["completion_tokens"] > 0


# The command's server: TLS, logs on stdout, and its end.


SERVER = """
import sys
from qserve.cli import serving
from qserve.cli.serving import bound_socket, check_tls, run_server
from qserve.server.async_engine import AsyncEngine
from qserve.config import ServerConfig
from qserve.testing.stub_engine import StubEngine
from qserve.testing.tiny import tiny_tokenizer
serving.LAST_SECONDS = 1
certificate, key = sys.argv[1:] or (None, None)
config = ServerConfig(port=0, log_requests=True, tls_certificate=certificate, tls_key=key)
check_tls(config)
tokenizer = tiny_tokenizer()
engine = StubEngine(tokenizer, step_seconds=0.005, max_model_len=10**7)
with bound_socket(config) as listener:
    run_server(AsyncEngine(engine, config.max_requests), tokenizer, "stub", listener, config)
"""


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "-c", SERVER, *arguments]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        assert server.stderr is not None
        yield server, server.stderr.readline().split()[-1].removesuffix("/v1")
    finally:
        server.kill()
        server.communicate()


def test_first_signal_drains() -> None:
    """Admitted requests finish, new ones are refused, and the process ends well by itself."""
    with process() as (server, url), httpx.Client(base_url=url, timeout=30) as http:
        wait_until(lambda: answers(http))
        body = {"prompt": "hello", "max_tokens": 400, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: http.get("/ready").status_code == 503)
            assert http.get("/health").status_code == 200
            refused = http.post("/v1/chat/completions", json={"messages": HELLO})
            assert "shutting down" in refusal(refused, 503)["message"]
            assert int(refused.headers["retry-after"]) > 0
            text = streamed_text([first, *lines])
        assert text == repeated("hello", 400)
        assert server.wait(20) == 0
        assert server.stdout is not None
        logged = [json.loads(line) for line in server.stdout.read().splitlines()]
        assert logged[-1]["completion_tokens"] == 400


def test_idle_server_ends_at_once_and_second_signal_ends_any() -> None:
    with process() as (server, url), httpx.Client(base_url=url, timeout=30) as http:
        wait_until(lambda: answers(http))
        with endless_stream(http):
            server.send_signal(signal.SIGINT)
            wait_until(lambda: http.get("/ready").status_code == 503)
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
    with process() as (server, url), httpx.Client(base_url=url) as http:
        wait_until(lambda: answers(http))
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_end_does_not_wait_for_a_client_that_stalls() -> None:
    with process() as (server, url), httpx.Client(base_url=url) as http:
        wait_until(lambda: answers(http))
        with half_a_body(url):
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    files = (str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem"))
    with process(*files) as (_, url):
        assert url.startswith("https://")
        with httpx.Client(base_url=url, verify=str(tmp_path / "authority.pem")) as http:
            wait_until(lambda: answers(http))
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
            assert metric(http, "vllm:generation_tokens_total") == 16
