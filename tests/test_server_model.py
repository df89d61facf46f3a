"""The server with a real engine: its answers are those of the offline API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_helpers import HELLO, MILLION, refusal, serving_model, wait_until

from qserve.engine.engine import Engine
from qserve.engine.llm import LLM
from qserve.engine.request import SamplingParams
from qserve.testing.tiny import save_tiny_model, tiny_config

PROMPT = "It was a dark and stormy night; "


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its texts can grow so long that a request of MILLION tokens is always under way."""
    config = tiny_config(max_position_embeddings=16384)
    return save_tiny_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def offline(directory: Path) -> LLM:
    return LLM(directory, max_num_sequences=8)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Engine:
    return LLM(directory, max_num_sequences=8).engine


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    with serving_model(engine) as http:
        yield http


def test_completion(client: openai.OpenAI, offline: LLM) -> None:
    expected = offline.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0))[0].text
    arguments = {"model": "stub", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    assert client.completions.create(**arguments).choices[0].text == expected
    parts = list(client.completions.create(**arguments, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected


def test_chat(client: openai.OpenAI, offline: LLM) -> None:
    expected = offline.chat(HELLO, SamplingParams(max_tokens=30, temperature=0))[0].text
    answer = client.chat.completions.create(
        model="stub", messages=HELLO, max_tokens=30, temperature=0
    )
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(client: openai.OpenAI, offline: LLM, stream: bool) -> None:
    text = offline.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0))[0].text
    stop = text[12:15]
    arguments = {"model": "stub", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    answer = client.completions.create(**arguments, stop=[stop], stream=stream)
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == stop


def test_seeded_choices_differ_among_themselves_and_come_again(
    client: openai.OpenAI, offline: LLM
) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=7, n=3)
    expected = [c.text for c in offline.generate(PROMPT, params)[0].completions]
    assert len(set(expected)) == 3
    for _ in range(2):
        answer = client.completions.create(
            model="stub", prompt=PROMPT, max_tokens=20, temperature=1.5, seed=7, n=3
        )
        assert [choice.text for choice in answer.choices] == expected


def test_logit_bias(client: openai.OpenAI) -> None:
    arguments = {"model": "stub", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    forced = client.completions.create(**arguments, logit_bias={"74": 100})
    assert forced.choices[0].text == "hhhhhh"
    other = client.completions.create(**arguments, logit_bias={"74": -100, "75": 100})
    assert other.choices[0].text == "iiiiii"


def test_min_tokens(client: openai.OpenAI) -> None:
    """A text that would end at once, as its first token is a stop, goes on for so long."""
    arguments = {"model": "stub", "prompt": PROMPT, "max_tokens": 9, "logit_bias": {"74": 100}}
    for min_tokens in (0, 4):
        extra = {"min_tokens": min_tokens, "stop_token_ids": [74]}
        answer = client.completions.create(**arguments, extra_body=extra)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].stop_reason == 74
        assert answer.usage.completion_tokens == min_tokens + 1
        assert "h" not in answer.choices[0].text


def test_logprobs(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=3, prompt_logprobs=3)
    generation = offline.generate(PROMPT, params)[0]
    answer = client.completions.create(
        model="stub", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, echo=True
    )
    scores = answer.choices[0].logprobs
    entries = [*generation.prompt_logprobs[1:], *generation.completions[0].logprobs]
    expected = [None, *(entry.logprob for entry in entries)]
    assert scores.token_logprobs == pytest.approx(expected)
    assert answer.choices[0].text.startswith(PROMPT)
    likeliest = [entry.top[0][1] for entry in entries]
    assert [max(top.values()) for top in scores.top_logprobs[1:]] == pytest.approx(likeliest)


def test_usage_counts_what_the_prefix_cache_gave(client: openai.OpenAI) -> None:
    prompt = "once upon a time " * 12
    usages = [
        client.completions.create(model="stub", prompt=prompt, max_tokens=2).usage for _ in "ab"
    ]
    assert [usage.prompt_tokens for usage in usages] == [len(prompt)] * 2
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached == [0, len(prompt) // 64 * 64]


def test_token_out_of_the_vocabulary(http: httpx.Client) -> None:
    error = refusal(http.post("/v1/completions", json={"prompt": [5, 10**6]}), 400)
    assert error["param"] == "prompt" and "1000000" in error["message"]


def test_disconnect_in_mid_stream_frees_pages(http: httpx.Client, engine: Engine) -> None:
    body = {"prompt": PROMPT, "max_tokens": MILLION, "stream": True, "ignore_eos": True, "n": 4}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
        assert engine.stats.pages_used > 0
    wait_until(lambda: engine.stats.pages_used == 0)


def test_many_clients_of_whom_some_leave(http: httpx.Client, engine: Engine, offline: LLM) -> None:
    """Those who stay get what they would get alone; those who leave leave no page behind."""
    prompts = [f"{PROMPT}{index} and then " * (1 + index % 3) for index in range(24)]
    bodies = [
        {"prompt": prompt, "max_tokens": 30, "ignore_eos": True, "seed": index, "stream": True}
        for index, prompt in enumerate(prompts)
    ]

    def read(body: dict[str, Any]) -> str | None:
        leaves_after = body["seed"] % 4 * 3 + 1 if body["seed"] % 2 else None
        text = ""
        with http.stream("POST", "/v1/completions", json=body) as response:
            for count, line in enumerate(line for line in response.iter_lines() if "{" in line):
                if count == leaves_after:
                    return None
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(len(bodies)) as pool:
        texts = list(pool.map(read, bodies))
    for index in range(0, len(prompts), 2):
        params = SamplingParams(max_tokens=30, ignore_eos=True, seed=index)
        assert texts[index] == offline.generate(prompts[index], params)[0].text
    assert texts.count(None) > 8  # a few texts have fewer parts than their reader wants
    wait_until(lambda: engine.stats.pages_used == 0)
