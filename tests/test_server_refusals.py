"""What the server refuses, and that it says which field is at fault."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, ValidationError
from server_helpers import (
    ENDPOINTS,
    HELLO,
    MILLION,
    metric,
    refusal,
    serving,
    stub_engine,
    wait_until,
)

from qserve.engine.request import RequestError
from qserve.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest
from qserve.testing.tiny import tiny_tokenizer

endpoints = pytest.mark.parametrize("path", ENDPOINTS)


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
        ("stop", ["x"] * 17),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", [5] * 1025),
        ("seed", 2**70),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("logit_bias", [1]),
        ("repetition_penalty", 0),
        ("presence_penalty", 1e9),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("ignore_eos", 1),
        ("model", 5),
    ],
    ids=lambda value: str(value)[:20],
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
        ([{"role": "user", "content": "x", "weight": 1}], "messages.0.weight"),
    ],
)
def test_bad_messages(http: httpx.Client, messages: Any, field: str) -> None:
    error = refusal(http.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert error["param"] == field


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_body_that_is_no_object(http: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refusal(http.post("/v1/completions", content=content, headers=headers), 400)


def test_body_without_its_type(http: httpx.Client) -> None:
    """As `curl -d` sends it; a web page of another site could send it, too, without being asked."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert "Content-Type: application/json" in refusal(response, 400)["message"]


def nested(depth: int) -> bytes:
    return b"[" * depth + b"1" + b"]" * depth


@pytest.mark.parametrize(
    "value",
    [
        nested(100),
        nested(100_000),
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"[" + b"9" * 5000 + b"]",
        b"[1e5]",
        b"[NaN]",
        b'"x' + b"\x00" + b'"',
    ],
    ids=lambda value: repr(value[:9]),
)
def test_wild_json(http: httpx.Client, value: bytes) -> None:
    """Nested deeper than any parser goes, no UTF-8, numbers that are none, raw control codes."""
    headers = {"content-type": "application/json"}
    for path, field in (("/v1/completions", b"prompt"), ("/v1/chat/completions", b"messages")):
        content = b'{"%s": %s}' % (field, value)
        refusal(http.post(path, content=content, headers=headers), 400)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "logprobs", 21),
        ("/v1/completions", "logprobs", -1),
        ("/v1/completions", "n", 129),
        ("/v1/chat/completions", "top_logprobs", 10**12),
        ("/v1/chat/completions", "n", 10**30),
        ("/v1/chat/completions", "max_completion_tokens", 10**30),
    ],
)
def test_huge_numbers(http: httpx.Client, path: str, field: str, value: int) -> None:
    body = {**ENDPOINTS[path], field: value}
    if field == "top_logprobs":
        body["logprobs"] = True
    error = refusal(http.post(path, json=body), 400)
    assert field.removeprefix("max_completion_") in error["message"]
    assert value < 0 or "at least" not in error["message"]


def test_prompt_of_ten_megabytes() -> None:
    """Refused by its size; where that is allowed, by its tokens, while others are served."""
    with serving(stub_engine(), max_body_bytes=2**22) as http:
        refusal(http.post("/v1/completions", json={"prompt": "x" * 10 * MILLION}), 413)
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(
                http.post, "/v1/completions", json={"prompt": "word " * (MILLION // 2)}
            )
            while not long.done():
                assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
            assert "tokens" in refusal(long.result(), 400)["message"]


MANY = 20_000


@pytest.mark.parametrize(
    ("request_type", "fields"),
    [
        (CompletionRequest, {"prompt": [True] * MANY}),
        (CompletionRequest, {"prompt": [[True]] * MANY}),
        (CompletionRequest, {"prompt": [["x"] * MANY]}),
        (CompletionRequest, {"stop": [5] * MANY}),
        (CompletionRequest, {"stop_token_ids": ["x"] * MANY}),
        (CompletionRequest, {"logit_bias": {str(i): "x" for i in range(MANY)}}),
        (CompletionRequest, {"metadata": {str(i): 5 for i in range(MANY)}}),
        (CompletionRequest, {"structured_outputs": {"choice": [5] * MANY}}),
        (CompletionRequest, {str(i): 5 for i in range(MANY)}),
        (ChatCompletionRequest, {"messages": [{"role": "x"}] * MANY}),
        (ChatCompletionRequest, {"messages": HELLO * MANY}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [5] * MANY}]}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [5] * MANY}]}),
        (ChatCompletionRequest, {"tools": [5] * MANY}),
        (ChatCompletionRequest, {"chat_template_kwargs": {str(i): 5 for i in range(MANY)}}),
        (DetokenizeRequest, {"tokens": ["x"] * MANY}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_many_mistakes_are_not_all_told(request_type: type[BaseModel], fields: Any) -> None:
    """To gather them would hold up the event loop, and with it all others."""
    needed = {CompletionRequest: {"prompt": "x"}, ChatCompletionRequest: {"messages": HELLO}}
    with pytest.raises(ValidationError) as refused:
        request_type(**needed.get(request_type, {}) | fields)
    assert refused.value.error_count() <= 5


def test_what_only_makes_sense_together() -> None:
    chat = {"messages": HELLO}
    with pytest.raises(RequestError, match="top_logprobs"):
        ChatCompletionRequest(**chat, top_logprobs=2).sampling_params()
    with pytest.raises(RequestError, match="differ"):
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
