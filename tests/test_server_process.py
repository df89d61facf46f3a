"""The engine in a process of its own: it serves as one on a thread does, and its end is noticed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import PIPE

import httpx
import pytest
from server_helpers import MILLION, metric, refusal, repeated, streamed_text, wait_until

from qserve.config import ConfigError
from qserve.engine.request import RequestError, SamplingParams
from qserve.server.app import create_app
from qserve.server.engine_process import EngineProcess
from qserve.testing.http import serve_in_thread
from qserve.testing.stub_engine import StubEngine
from qserve.testing.tiny import tiny_tokenizer


class Stub(StubEngine):
    """Refuses one grammar, and fails over a prompt that begins with token 13."""

    def __init__(self) -> None:
        super().__init__(tiny_tokenizer(), step_seconds=0.002, max_model_len=64 * MILLION)

    def prepare(self, params: SamplingParams) -> None:
        if params.grammar is not None and "(" in params.grammar.text:
            raise RequestError("the grammar is bad")

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        super().add_request(request_id, prompt, params)
        if prompt[0] == 13:
            self.failure = RuntimeError("out of memory")


def refused() -> StubEngine:
    raise ConfigError("the cache does not fit")


def killed() -> StubEngine:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@contextmanager
def serving() -> Iterator[tuple[EngineProcess, httpx.Client]]:
    engine = EngineProcess(Stub, 100)
    app = create_app(engine, engine.tokenizer, "stub")
    with serve_in_thread(app) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield engine, http
    assert engine._process.exitcode is not None, "the process has not ended"


def test_it_serves_as_a_thread_does() -> None:
    with serving() as (_, http):
        body = {"prompt": "hello", "max_tokens": 300, "logit_bias": {"70": 1}}
        whole = http.post("/v1/completions", json=body).json()
        streamed = http.post("/v1/completions", json=body | {"stream": True}).text
        assert whole["choices"][0]["text"] == repeated("hello", 300)
        assert streamed_text(streamed.splitlines()) == repeated("hello", 300)
        assert metric(http, "vllm:generation_tokens_total") == 600
        guided = {"prompt": "hello", "structured_outputs": {"regex": "a"}}
        assert http.post("/v1/completions", json=guided).status_code == 200
        guided = {"prompt": "hello", "structured_outputs": {"regex": "("}}
        bad = http.post("/v1/completions", json=guided)
        assert "grammar is bad" in refusal(bad, 400)["message"]
        refusal(http.post("/v1/completions", json={"prompt": [70] * 9, "max_tokens": -1}), 400)


def test_clients_that_leave_free_what_they_held() -> None:
    with serving() as (_, http):
        body = {"prompt": "hello", "max_tokens": MILLION}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(http.base_url.join("/v1/completions"), json=body, timeout=0.3)
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)


def test_a_failure_says_why() -> None:
    with serving() as (_, http):
        failed = http.post("/v1/completions", json={"prompt": [13], "max_tokens": 9})
        assert "out of memory" in refusal(failed, 500)["message"]
        wait_until(lambda: http.get("/health").status_code == 503)
        assert "out of memory" in http.get("/health").text


def test_a_process_that_is_killed_ends_its_requests() -> None:
    with serving() as (engine, http):
        body = {"prompt": "hello", "max_tokens": MILLION, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            assert engine._process.pid is not None
            os.kill(engine._process.pid, signal.SIGKILL)
            assert "its process has ended" in list(lines)[-1]
        assert http.get("/health").status_code == 503
        refusal(http.post("/v1/completions", json={"prompt": "hello"}), 500)


def test_signals_that_all_processes_get_are_the_servers_to_heed() -> None:
    with serving() as (engine, http):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine._process.pid or 0, number)
        body = {"prompt": "hello", "max_tokens": 30}
        assert http.post("/v1/completions", json=body).status_code == 200


def slowly() -> StubEngine:
    print("loading", flush=True)
    time.sleep(0.5)
    return Stub()


@pytest.mark.parametrize(
    ("start", "number"),
    [("EngineProcess(Stub, 1); print()", 0), ("EngineProcess(slowly, 1)", signal.SIGKILL)],
    ids=["it ends at once", "it is killed while the model is loaded"],
)
def test_it_ends_with_its_server(start: str, number: int) -> None:
    """At its exit, Python asks such processes to end, by a signal that this one ignores, and waits."""
    program = f"from test_server_process import *; engine = {start}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=PIPE, stderr=PIPE
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        server.send_signal(number)
        _, errors = server.communicate(timeout=60)  # until both have ended
    assert errors == b""


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (refused, ConfigError, "the cache does not fit"),
        (killed, RuntimeError, "before it was ready"),
    ],
)
def test_what_keeps_it_from_starting_is_raised(
    load: Callable[[], StubEngine], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        EngineProcess(load, 100)
    assert load is killed or "in refused" in str(raised.value.__cause__)


def test_parameters_travel() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, stop=("a", "b"), seed=7)
    assert pickle.loads(pickle.dumps(params)) == params
