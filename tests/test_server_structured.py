"""Structured output over HTTP: whatever a random model says, it is what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field
from server_helpers import ENDPOINTS, HELLO, refusal, serving_model

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import SamplingParams
from qserve.testing.tiny import tiny_source

endpoints = pytest.mark.parametrize("path", ENDPOINTS)


class Point(BaseModel):
    label: str = Field(max_length=6)
    axis: Literal["x", "y"]
    at: list[int] = Field(max_length=3)


SCHEMA = Point.model_json_schema() | {"additionalProperties": False}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "point", "description": "It.", "schema": SCHEMA, "strict": True},
}
DIGITS = {"structured_outputs": {"regex": "[0-9]{4}"}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_source(tiny_source(), EngineConfig(max_num_sequences=16))


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    with serving_model(engine) as http:
        yield http


def texts(http: httpx.Client, path: str, **fields: Any) -> list[str]:
    """The texts of the choices, which must all have come to their end."""
    body = {**ENDPOINTS[path], "max_tokens": 400, **fields}
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [
        choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices
    ]


@endpoints
def test_json_schema(http: httpx.Client, path: str) -> None:
    for text in texts(http, path, response_format=FORMAT, n=4, seed=3):
        Point.model_validate_json(text)


def test_a_parsed_answer(client: openai.OpenAI) -> None:
    """As the client's own helper asks for it."""
    answer = client.chat.completions.parse(
        model="stub", messages=HELLO, response_format=Point, max_tokens=400, seed=8
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


@endpoints
def test_json_object(http: httpx.Client, path: str) -> None:
    """The schema leaves everything open, so an end is made likely by a bias."""
    brace = {str(http.post("/tokenize", json={"prompt": "}"}).json()["tokens"][0]): 100}
    for named in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}):
        for text in texts(http, path, response_format=named, logit_bias=brace, n=2):
            assert isinstance(json.loads(text), dict)


@endpoints
@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[0-9]{2,4}[a-z]"}, "[0-9]{2,4}[a-z]"),
        ({"choice": ["yes", "no", 'it "may" be']}, 'yes|no|it "may" be'),
        ({"grammar": 'start: word ("-" word)?\nword: /[ab]{3}/'}, "[ab]{3}(-[ab]{3})?"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_structured_outputs(http: httpx.Client, path: str, outputs: Any, pattern: str) -> None:
    found = texts(http, path, structured_outputs=outputs, n=6, seed=1)
    assert all(re.fullmatch(pattern, text) for text in found)


def test_plain_text_is_a_format_too(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
    answers = [
        http.post("/v1/chat/completions", json=body | extra).json()["choices"][0]["message"]
        for extra in ({}, {"response_format": {"type": "text"}})
    ]
    assert answers[0] == answers[1]


@endpoints
def test_streaming_says_the_same(http: httpx.Client, path: str) -> None:
    fields = {"response_format": FORMAT, "n": 3, "seed": 4}
    body = {**ENDPOINTS[path], "max_tokens": 400, **fields, "stream": True}
    pieces = ["", "", ""]
    with http.stream("POST", path, json=body) as response:
        for line in response.iter_lines():
            for choice in json.loads(line[6:])["choices"] if "{" in line else ():
                pieces[choice["index"]] += choice.get("text", "") or choice.get("delta", {}).get(
                    "content", ""
                )
    assert pieces == texts(http, path, **fields)


def test_logprobs_go_with_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="stub", messages=HELLO, logprobs=True, top_logprobs=2, extra_body=DIGITS
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries[:4]) == answer.choices[0].message.content
    assert all(entry.logprob < 0 for entry in entries)


def test_a_stop_string_may_cut_it_short(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="stub",
        prompt="x",
        stop=["b"],
        extra_body={"structured_outputs": {"regex": "a{3}b{9}"}},
    )
    assert answer.choices[0].text == "aaa" and answer.choices[0].stop_reason == "b"


def test_others_are_served_while_a_grammar_is_compiled(http: httpx.Client, engine: Engine) -> None:
    compile_, meanwhile = engine.prepare, []

    def held_up(params: SamplingParams) -> None:
        if params.n == 2 and not meanwhile:
            meanwhile.extend(texts(http, "/v1/completions", **DIGITS))
        compile_(params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "prepare", held_up)
        texts(http, "/v1/completions", **DIGITS, n=2)
    assert re.fullmatch("[0-9]{4}", meanwhile[0])


def test_a_bug_in_compiling_a_grammar_is_answered(http: httpx.Client, engine: Engine) -> None:
    def broken(_: SamplingParams) -> None:
        raise LookupError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "prepare", broken)
        body = {"prompt": "x", **DIGITS}
        answer = refusal(http.post("/v1/completions", json=body), 500)
    assert "internal error" in answer["message"]
    texts(http, "/v1/completions", **DIGITS)


def test_many_at_once_in_mixed_company(http: httpx.Client) -> None:
    """Guided and free, whole: each as if it were alone."""
    bodies = [
        ("/v1/completions", {"seed": index, "max_tokens": 60, **kind})
        for index, kind in enumerate(
            [DIGITS, {"ignore_eos": True}, {"response_format": FORMAT}] * 6
        )
    ]

    def text(arguments: tuple[str, dict[str, Any]]) -> str:
        path, fields = arguments
        answer = http.post(path, json={**ENDPOINTS[path], **fields}).json()
        return str(answer["choices"][0]["text"])

    alone = [text(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(text, bodies)) == alone


@endpoints
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": "json"}, "response_format", "dictionary"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
            "response_format",
            "dictionary",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strin"}},
                }
            },
            "response_format",
            "strin",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least 1"),
        ({"structured_outputs": {"choice": [5]}}, "structured_outputs", "string"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs", "::="),
        ({"structured_outputs": {"regex": "x" * 10**6}}, "structured_outputs", "characters"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs", "not"),
        ({"guided_regex": "a"}, "guided_regex", "not supported"),
        ({**DIGITS, "response_format": FORMAT}, "structured_outputs", "exclude each other"),
        ({**DIGITS, "ignore_eos": True}, "structured_outputs", "ignore_eos"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(http: httpx.Client, path: str, fields: Any, param: str, message: str) -> None:
    error = refusal(http.post(path, json={**ENDPOINTS[path], **fields}), 400)
    assert error["param"] == param and message in error["message"]


@pytest.mark.parametrize("depth", [30, 150, 5000])
def test_deep_schemas_are_kept_to_or_refused(http: httpx.Client, depth: int) -> None:
    """Neither hangs nor ends the server; what is kept to is kept to."""
    schema = (
        '{"type":"array","minItems":1,"maxItems":1,"items":' * depth + '{"const":1}' + "}" * depth
    )
    content = f'{{"prompt": "x", "max_tokens": 400, "structured_outputs": {{"json": {schema}}}}}'
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    if depth > 100:
        refusal(response, 400)
        return
    text = response.json()["choices"][0]["text"]
    assert text.count("[") == depth
