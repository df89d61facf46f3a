"""/tokenize and /detokenize: the tokens that the model sees."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_helpers import HELLO, MILLION, refusal, serving, stub_engine

from qserve.testing.tiny import tiny_tokenizer


def test_tokens_of_a_text_and_of_a_conversation(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"prompt": "hi"}).json() == {"tokens": [74, 75], "count": 2}
    for body, endpoint in (
        ({"prompt": "é one"}, "/v1/completions"),
        ({"messages": HELLO}, "/v1/chat/completions"),
    ):
        count = http.post("/tokenize", json=body).json()["count"]
        usage = http.post(endpoint, json={**body, "max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens"] == count


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(http: httpx.Client, text: str) -> None:
    tokens = http.post("/tokenize", json={"prompt": text, "model": "stub"}).json()["tokens"]
    answer = http.post("/detokenize", json={"tokens": tokens, "model": "stub"})
    assert answer.json() == {"prompt": text}


def test_special_tokens_are_spelled(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_templates_have_settings() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}{{ messages[0].content }}"
    with serving(stub_engine(tokenizer)) as http:
        settings = {"chat_template_kwargs": {"enable_thinking": False}}
        for given, text in (({}, "hello"), (settings, "no hello")):
            body = {"messages": HELLO, **given}
            tokens = http.post("/tokenize", json=body).json()["tokens"]
            assert tokenizer.decode(tokens) == text
            answer = http.post("/v1/chat/completions", json=body | {"max_tokens": len(text)}).json()
            assert answer["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("name", ["messages", "tools", "tokenize", "add_generation_prompt"])
@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
def test_settings_of_the_server_are_not_the_templates(
    http: httpx.Client, path: str, name: str
) -> None:
    body = {"messages": HELLO, "chat_template_kwargs": {name: False}}
    assert repr(name) in refusal(http.post(path, json=body), 400)["message"]


def test_refusal_is_worded_well(http: httpx.Client) -> None:
    error = refusal(http.post("/tokenize", json={}), 400)
    assert error["message"] == "either prompt or messages must be given" and not error["param"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/tokenize", {"prompt": "x", "messages": HELLO}, 400, "either prompt or messages"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "other"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [len(tiny_tokenizer())]}, 400, "tokens holds"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens holds -1"),
        ("/detokenize", {"tokens": [10**30]}, 400, "tokens holds"),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404, "other"),
        ("/detokenize", {"tokens": [5], "skip": True}, 400, "skip is not supported"),
    ],
)
def test_refusals(http: httpx.Client, path: str, body: Any, status: int, message: str) -> None:
    assert message in refusal(http.post(path, json=body), status)["message"]


def test_need_a_key() -> None:
    with serving(stub_engine(), api_keys=("secret",)) as http:
        refusal(http.post("/tokenize", json={"prompt": "x"}), 401)
        refusal(http.post("/detokenize", json={"tokens": [5]}), 401)


def test_long_text(http: httpx.Client) -> None:
    """Longer than the model takes, which is no reason not to count its tokens."""
    assert http.post("/tokenize", json={"prompt": "x" * MILLION}).json()["count"] == MILLION
