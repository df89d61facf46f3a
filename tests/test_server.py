"""The OpenAI API over HTTP, driven by OpenAI's own client. The engine here repeats prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qserve.engine.request import RequestError
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine
from qserve.server.protocol import ChatCompletionRequest, CompletionRequest
from qserve.server.text import TextCodec
from qserve.testing.http import serve_in_thread
from qserve.testing.stub_engine import StubEngine
from qserve.testing.tiny import tiny_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
HELLO_PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
ENDPOINTS = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": HELLO},
}
endpoints = pytest.mark.parametrize("path", ENDPOINTS)
MILLION = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@contextmanager
def serving(engine: StubEngine, max_requests: int = 100) -> Iterator[httpx.Client]:
    app = create_app(AsyncEngine(engine, max_requests), engine.tokenizer, "stub")
    with serve_in_thread(app) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def http(tokenizer: PreTrainedTokenizerFast) -> Iterator[httpx.Client]:
    with serving(StubEngine(tokenizer)) as http:
        yield http


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> openai.OpenAI:
    return openai_client(http)


def openai_client(http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=str(http.base_url.join("/v1")), api_key="none", max_retries=0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def repeated(text: str, num_tokens: int) -> str:
    """What the stub answers to a text of one-byte characters."""
    return (text * num_tokens)[:num_tokens]


# Answers.


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="stub", messages=HELLO, max_completion_tokens=9, temperature=0, user="someone"
    )
    assert answer.choices[0].message.content == "<|im_start|>user\nhel"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion" and answer.model == "stub"
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_content_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(
        model="stub", messages=[{"role": "user", "content": parts}], max_tokens=12
    )
    assert answer.choices[0].message.content == "<|im_start|>user\nhel\nlo"


def test_chat_without_limit_fills_the_model(client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(model="stub", messages=HELLO).usage
    assert usage.total_tokens == 4096


def test_streamed_chat_joins_to_the_whole_one(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="stub",
            messages=HELLO,
            max_tokens=30,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, closing = chunks
    assert closing.choices == [] and closing.usage.completion_tokens == 60
    assert len({chunk.id for chunk in chunks}) == 1
    for index in range(2):
        choices = [p.choices[0] for p in parts if p.choices[0].index == index]
        assert len(choices) == 30
        assert [c.delta.role for c in choices] == ["assistant"] + [None] * 29
        text = "".join(c.delta.content for c in choices)
        assert text == (HELLO_PROMPT * 2)[: len(text)] and len(text) > 30
        assert [c.finish_reason for c in choices] == [None] * 29 + ["length"]


def test_stream_has_no_usage_unless_asked(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="stub", prompt="ab", max_tokens=3, stream=True)
    chunks = list(stream)
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "b", "a"]
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"prompt": "é", "max_tokens": 2, "stream": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    first = json.loads(events[0].removeprefix("data: "))
    assert "usage" not in first
    assert first["choices"][0]["finish_reason"] is None and first["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [74, 75], [[74, 75]]], ids=str)
def test_every_form_of_a_prompt(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast, prompt: Any
) -> None:
    assert tokenizer.encode("hi") == [74, 75]
    answer = client.completions.create(model="stub", prompt=prompt, max_tokens=5)
    assert answer.choices[0].text == "hihih"


def test_completion_has_the_length_of_openais(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="stub", prompt="hi")
    assert answer.choices[0].text == repeated("hi", 16)


def test_choices_of_several_prompts_are_numbered_over_all(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="stub", prompt=["ab", "cde"], n=2, max_tokens=4)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == ["abab", "abab", "cdec", "cdec"]
    assert answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: openai.OpenAI, stream: bool) -> None:
    arguments = {"model": "stub", "prompt": ["abc", "de"], "max_tokens": 2, "echo": True}
    if stream:
        chunks = list(client.completions.create(**arguments, logprobs=2, stream=True))
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == 0]
    else:
        choices = client.completions.create(**arguments, logprobs=2).choices[:1]
    scores = [choice.logprobs for choice in choices]
    assert "".join(choice.text for choice in choices) == "abcab"
    assert [t for s in scores for t in s.tokens] == ["a", "b", "c", "a", "b"]
    assert [p for s in scores for p in s.token_logprobs] == [None, -0.5, -0.5, -0.5, -0.5]
    assert [o for s in scores for o in s.text_offset] == [0, 1, 2, 3, 4]
    top = [t for s in scores for t in s.top_logprobs]
    assert top[0] is None and top[1] == {"b": -0.5, "<|endoftext|>": -3.0}


def test_chat_logprobs_spell_bytes(client: openai.OpenAI) -> None:
    """A character of two tokens: neither is text, but their bytes join to it."""
    answer = client.chat.completions.create(
        model="stub",
        messages=[{"role": "user", "content": "é"}],
        max_tokens=9,
        logprobs=True,
        top_logprobs=1,
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 9 and all(len(token.top_logprobs) == 1 for token in tokens)
    assert (
        bytes(b for token in tokens for b in token.bytes).decode()
        == "<|im_start|>user\né<|im_end|>"
    )
    assert [token.token for token in tokens[1:5]] == ["u", "s", "e", "r"]


def test_spaces_and_bytes_of_a_sentencepiece_vocabulary() -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "▁the": 2, "a": 3, "▁a": 4, "<0xC3>": 5, "<0xA9>": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    stripped = decoders.Strip(" ", 1, 0)
    spaced = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [spaced, decoders.ByteFallback(), decoders.Fuse(), stripped]
    )
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert codec.spell(2) == (" the", [32, *b"the"])
    assert codec.spell(3) == ("a", [97])
    assert [codec.spell(token)[1] for token in (5, 6)] == [[0xC3], [0xA9]]


def test_models_and_health(http: httpx.Client, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub"]
    assert http.get("/health").json() == {"status": "ok"}


def test_metrics(tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(StubEngine(tokenizer)) as http:
        body = {"prompt": ["ab", "cde"], "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
        expected = {
            "vllm:prompt_tokens_total": 5,
            "vllm:generation_tokens_total": 8,
            "vllm:prefix_cache_queries_total": 5,
            "vllm:num_requests_running": 0,
            "vllm:kv_cache_usage_perc": 0,
            "vllm:request_success_total": 2,
            "vllm:time_to_first_token_seconds_count": 2,
            "vllm:request_time_per_output_token_seconds_count": 2,
            "vllm:e2e_request_latency_seconds_count": 2,
            "vllm:request_prompt_tokens_sum": 5,
            "vllm:request_generation_tokens_sum": 8,
        }
        assert {name: metric(http, name) for name in expected} == expected


# Refusals.


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


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
    with serving(StubEngine(bare)) as http:
        error = refusal(http.post("/v1/chat/completions", json={"messages": HELLO}), 400)
        assert "chat template" in error["message"]
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


# Trouble.


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


def slow_engine(tokenizer: PreTrainedTokenizerFast, **arguments: Any) -> StubEngine:
    return StubEngine(tokenizer, step_seconds=0.002, max_model_len=64 * MILLION, **arguments)


def test_disconnect_in_mid_stream_frees_pages(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = slow_engine(tokenizer)
    with serving(engine) as http:
        with endless_stream(http):
            assert metric(http, "vllm:num_requests_running") == 1
            assert metric(http, "vllm:kv_cache_usage_perc") > 0
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)
        assert metric(http, "vllm:kv_cache_usage_perc") == 0
        assert not engine.has_unfinished


def test_disconnect_before_the_answer_frees_pages(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = slow_engine(tokenizer)
    with serving(engine) as http:
        body = {"prompt": "hello", "max_tokens": MILLION}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(http.base_url.join("/v1/completions"), json=body, timeout=0.2)
        wait_until(lambda: not engine.has_unfinished)
        assert metric(http, "vllm:kv_cache_usage_perc") == 0


def test_disconnect_of_one_who_waits(tokenizer: PreTrainedTokenizerFast) -> None:
    """No token has come yet that could fail to be sent."""
    with serving(slow_engine(tokenizer, max_running=1)) as http, endless_stream(http) as lines:
        body = {"prompt": "hello", "stream": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(http.base_url.join("/v1/completions"), json=body, timeout=0.2)
        wait_until(lambda: metric(http, "vllm:num_requests_waiting") == 0)
        assert metric(http, "vllm:num_requests_running") == 1
        assert next(line for line in lines if line)


def test_full_queue(tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(slow_engine(tokenizer), max_requests=2) as http:
        with endless_stream(http), endless_stream(http):
            response = http.post("/v1/completions", json={"prompt": "x"})
            assert refusal(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) > 0
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_crash_of_the_engine_reaches_everyone(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = slow_engine(tokenizer)
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


def test_shutdown_lets_requests_finish(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = StubEngine(tokenizer, step_seconds=0.005)
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
