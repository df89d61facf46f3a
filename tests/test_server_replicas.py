"""`qserve serve --replicas 2`: two engines behind one server, and one of them killed under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from server_helpers import metric, refusal, wait_until

from qserve.engine.engine import EngineStats
from qserve.engine.llm import LLM
from qserve.engine.request import SamplingParams
from qserve.server.shared_engine import StepTotals, UnavailableError
from qserve.testing.http import serve_in_process
from qserve.testing.tiny import save_tiny_model, tiny_config

pytest.importorskip("ray.serve")

from qserve.server.replicas import ReplicatedEngine, Report

CLIENTS = 12
TOKENS = 400
PROMPTS = [f"client {index} asks for a story" for index in range(CLIENTS)]
LOST = "the replica that served the request has ended"


@dataclass
class Replicated:
    """A server with two replicas: its process, a client, and the same model in this process."""

    process: subprocess.Popen[str]
    http: httpx.Client
    offline: LLM

    def replicas(self) -> list[int]:
        """The process ids of the replicas that are alive."""
        return [pid for pid in _descendants(self.process.pid) if "ServeReplica" in _title(pid)]

    def expected(self, prompt: str) -> str:
        return self.offline.generate(prompt, SamplingParams(**sampling(prompt)))[0].text


def sampling(prompt: str) -> dict[str, Any]:
    return {"max_tokens": TOKENS, "seed": len(prompt), "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
    directory = save_tiny_model(
        tmp_path_factory.mktemp("model"), tiny_config(max_position_embeddings=4096)
    )
    options = ("--precision", "fp32", "--replicas", "2")
    with (
        serve_in_process(str(directory), *options, OMP_NUM_THREADS="1") as (process, url),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield Replicated(process, http, LLM(directory, max_num_sequences=8))


def _descendants(pid: int) -> list[int]:
    children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(d for child in children for d in _descendants(child))]


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def stream(
    http: httpx.Client, prompt: str, has_begun: Callable[[], object] = lambda: None
) -> tuple[str, str | None]:
    """The text that came, and the error that ended it, if one did."""
    body = {"prompt": prompt, "stream": True, **sampling(prompt)}
    text, error, is_first = "", None, True
    with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            return "", refusal(response, 503)["message"]
        for line in filter(None, response.iter_lines()):
            if line == "data: [DONE]":
                return text, None
            if is_first:
                has_begun()
            is_first = False
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error", {}).get("message")
            text += "" if error else event["choices"][0]["text"]
    return text, error


def test_sums_over_replicas_that_come_and_go() -> None:
    """Before the first report all is well; counts of one that is gone stay, its state does not."""
    engine = ReplicatedEngine(SimpleNamespace(options=lambda **_: None), max_requests=5)
    stats = EngineStats(*range(1, 1 + len(fields(EngineStats))))
    one, two = (Report(name, stats, StepTotals(3, 0.5)) for name in "ab")
    engine._take_reports([])
    engine.check_ready()
    engine._take_reports([one, two])
    assert engine.stats.running == 2 * stats.running
    assert engine.stats.generated_tokens == 2 * stats.generated_tokens
    engine._take_reports([two])
    assert engine.stats.running == stats.running and engine.stats.pages_total == stats.pages_total
    assert engine.stats.generated_tokens == 2 * stats.generated_tokens
    assert engine.step_totals == StepTotals(6, 1.0)
    engine._take_reports([])
    with pytest.raises(UnavailableError, match="no replica"):
        engine.check_ready()
    engine._take_reports([two])
    engine.check_ready()


@pytest.mark.slow
def test_answers_are_those_of_one_engine(server: Replicated) -> None:
    for prompt in PROMPTS[:3]:
        assert stream(server.http, prompt) == (server.expected(prompt), None)
    refused = server.http.post("/v1/completions", json={"prompt": "x" * 5000})
    assert "tokens" in refusal(refused, 400)["message"]


@pytest.mark.slow
def test_equal_beginnings_meet_in_one_cache(server: Replicated) -> None:
    beginning = "a long instruction that many requests share, " * 6
    cached = []
    for end in "abcdef":
        answer = server.http.post("/v1/completions", json={"prompt": beginning + end})
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, *[len(beginning) // 64 * 64] * 5]


@pytest.mark.slow
def test_one_killed_under_load(server: Replicated) -> None:
    """Only what it was computing is lost, with an error that says so, and it comes back.

    What it had counted stays counted, as Prometheus wants of a counter.
    """
    first, second = server.replicas()
    expected = [server.expected(prompt) for prompt in PROMPTS]
    wait_until(lambda: metric(server.http, "vllm:generation_tokens_total") > 0)
    pages = metric(server.http, "qserve:kv_cache_pages")
    counted = metric(server.http, "vllm:generation_tokens_total")
    with ThreadPoolExecutor(CLIENTS) as pool:
        all_begun = Barrier(CLIENTS + 1, timeout=20)
        begun = [pool.submit(stream, server.http, prompt, all_begun.wait) for prompt in PROMPTS]
        all_begun.wait()
        os.kill(first, signal.SIGKILL)
        ended = [future.result() for future in begun]
        later = [
            future.result() for future in [pool.submit(stream, server.http, p) for p in PROMPTS]
        ]
    lost = [error for _, error in ended if error is not None]
    assert 0 < len(lost) < CLIENTS and set(lost) == {LOST}
    for (text, error), whole in zip(ended, expected, strict=True):
        assert whole.startswith(text) and (error is not None or text == whole)
    assert later == [(text, None) for text in expected]
    wait_until(lambda: len(server.replicas()) == 2 and first not in server.replicas(), 60)
    wait_until(lambda: metric(server.http, "qserve:kv_cache_pages") == pages, 60)
    assert second in server.replicas()
    assert metric(server.http, "vllm:generation_tokens_total") >= counted > 0
