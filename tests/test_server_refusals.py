"""What the server refuses, and that it says which field is at fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from server_helpers import (
    ENDPOINTS,
    HELLO,
    MILLION,
    metric,
    openai_client,
    refusal,
    serving,
    stub_engine,
    wait_until,
)

from qserve.engine.request import RequestError
from qserve.server.protocol import ChatCompletionRequest, CompletionRequest
from qserve.testing.tiny import tiny_tokenizer

endpoints = pytest.mark.parametrize("path", ENDPOINTS)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with serving(stub_engine()) as http:
        yield http


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> openai.OpenAI:
    return openai_client(http)


@endpoints
def test_unsupported_field_is_named(http: httpx.Client, path: str) -> None:
    error = refusal(http.post(path, json={**ENDPOINTS[path], "best_of": 3}), 400)
    assert error["param"] == "best_of" and "best_of" in error["message"]
    assert error["type"] == "invalid_request_error"


@endpoints
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", 1.5),
        ("min_p", 2),
        ("n", 0),
        ("n", 10**9),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("stop", 7),
        ("stop", [""]),
        ("stop_token_ids", ["x"]),
        ("seed", 2**70),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [1]),
        ("repetition_penalty", 0),
        ("presence_penalty", 1e9),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("ignore_eos", 1),
        ("model", 5),
    ],
)
def test_bad_value_is_named(http: httpx.Client, path: str, field: str, value: Any) -> None:
    error = refusal(http.post(path, json={**ENDPOINTS[path], field: value}), 400)
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize("prompt", [None, 5, "", [], [[]], ["a", 1], "\ud800", {"a": 1}], ids=str)
def test_bad_prompt(http: httpx.Client, prompt: Any) -> None:
    body = json.dumps({"prompt": prompt})
    headers = {"content-type": "application/json"}
    error = refusal(http.post("/v1/completions", content=body, headers=headers), 400)
    assert "prompt" in error["message"]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages"),
        ([{"role": "robot", "content": "x"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages.0.tool_calls"),
    ],
)
def test_bad_messages(http: httpx.Client, messages: Any, field: str) -> None:
    error = refusal(http.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert error["param"] == field


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_body_that_is_no_object(http: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refusal(http.post("/v1/completions", content=content, headers=headers), 400)


def test_what_only_makes_sense_together() -> None:
    chat = {"messages": HELLO}
    with pytest.raises(RequestError, match="top_logprobs"):
        ChatCompletionRequest(**chat, top_logprobs=2).sampling_params()
    with pytest.raises(RequestError, match="exclude each other"):
        ChatCompletionRequest(**chat, max_tokens=2, max_completion_tokens=3).sampling_params()


def test_every_sampling_field_reaches_the_engine() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "n": 3,
        "stop": ["x"],
        "stop_token_ids": [4],
        "seed": 7,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"3": -5.0},
        "min_tokens": 2,
        "ignore_eos": True,
        "max_tokens": 9,
        "logprobs": 4,
    }
    params = CompletionRequest(prompt="x", **fields).sampling_params()
    reached = {name: getattr(params, name) for name in fields}
    expected = {**fields, "stop": ("x",), "stop_token_ids": (4,), "logit_bias": {3: -5.0}}
    assert reached == expected
    assert params.prompt_logprobs is None


def test_null_is_the_default() -> None:
    nulls = dict.fromkeys(set(CompletionRequest.model_fields) - {"prompt"})
    given = CompletionRequest(prompt="x", **nulls).sampling_params()
    assert given == CompletionRequest(prompt="x").sampling_params()


@endpoints
def test_over_long_prompt(http: httpx.Client, path: str) -> None:
    long = "x" * 5000
    body = (
        {"prompt": long}
        if "prompt" in ENDPOINTS[path]
        else {"messages": [{"role": "user", "content": long}]}
    )
    for stream in (False, True):
        error = refusal(http.post(path, json={**body, "stream": stream}), 400)
        assert "tokens" in error["message"]
    assert metric(http, "vllm:num_requests_running") == 0


def test_one_bad_prompt_of_several_frees_the_others(http: httpx.Client) -> None:
    body = {"prompt": ["ok", "x" * 5000], "max_tokens": MILLION}
    refusal(http.post("/v1/completions", json=body), 400)
    wait_until(lambda: metric(http, "vllm:kv_cache_usage_perc") == 0)


def test_other_model_and_other_path(http: httpx.Client, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="x")
    refusal(http.get("/v1/nothing"), 404)
    refusal(http.get("/v1/completions"), 405)


def test_model_without_chat_template() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with serving(stub_engine(bare)) as http:
        error = refusal(http.post("/v1/chat/completions", json={"messages": HELLO}), 400)
        assert "chat template" in error["message"]
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
