"""Answers of the OpenAI API over HTTP, as OpenAI's own client takes them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from server_helpers import (
    HELLO,
    metric,
    repeated,
    serving,
    stub_engine,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qserve.server.text import TextCodec
from qserve.testing.tiny import tiny_tokenizer

HELLO_PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


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
        roles, reasons = [c.delta.role for c in choices], [c.finish_reason for c in choices]
        assert roles[0] == "assistant" and not any(roles[1:])
        text = "".join(c.delta.content for c in choices)
        assert text == (HELLO_PROMPT * 2)[: len(text)] and len(text) > 30
        assert reasons[-1] == "length" and not any(reasons[:-1])


def test_stream_has_no_usage_unless_asked(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="stub", prompt="ab", max_tokens=3, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "aba"
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"prompt": "é", "max_tokens": 2, "stream": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    first = json.loads(events[0].removeprefix("data: "))
    assert "usage" not in first
    assert set(first["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [74, 75], [[74, 75]]], ids=str)
def test_every_form_of_a_prompt(client: openai.OpenAI, prompt: Any) -> None:
    assert tiny_tokenizer().encode("hi") == [74, 75]
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


def test_metrics() -> None:
    with serving(stub_engine()) as http:
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
            "qserve:engine_steps_total": 4,
        }
        assert {name: metric(http, name) for name in expected} == expected
        assert metric(http, "qserve:engine_step_seconds_total") > 0
