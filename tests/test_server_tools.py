"""Tools in chats: what the model is told of them, and its calls, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_helpers import HELLO, openai_client, refusal, serving, stub_engine

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import FinishReason, SamplingParams, SequenceOutput
from qserve.server.tool_calls import STYLES, CallPart, ToolCallReader, style_of
from qserve.server.tools import Tool, tool_use
from qserve.testing.stub_engine import StubEngine
from qserve.testing.tiny import tiny_source, tiny_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/name"},
        "unit": {"enum": ["celsius", "kelvin"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 6}},
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Now.", "parameters": PARAMETERS},
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]

ECHO = "{# tools, <tool_call> #}{{ messages[-1]['content'] }}"
"""A template that teaches Hermes' style; with an engine that repeats prompts, what the user says is
what the model answers."""


class Parrot(StubEngine):
    """Says its prompt once, token by token, and stops."""

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        once = replace(params, max_tokens=params.max_tokens or len(prompt_token_ids))
        super().add_request(request_id, prompt_token_ids, once)

    def _output(
        self, index: int, token: int, params: SamplingParams, finished: bool
    ) -> SequenceOutput:
        output = super()._output(index, token, params, finished)
        return output._replace(finish_reason=FinishReason.STOP if finished else None)


def tokenizer(chat_template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def parrot() -> Iterator[httpx.Client]:
    with serving(Parrot(tokenizer(ECHO))) as http:
        yield http


@pytest.fixture(scope="module")
def llama() -> Iterator[httpx.Client]:
    with serving(Parrot(tokenizer(ECHO)), tool_parser="llama3") as http:
        yield http


def ask(http: httpx.Client, text: str, **options: Any) -> Any:
    """The one choice of the answer."""
    arguments = {"messages": [{"role": "user", "content": text}], "tools": TOOLS, **options}
    return openai_client(http).chat.completions.create(model="stub", **arguments).choices[0]


def streamed(client: openai.OpenAI, **arguments: Any) -> list[tuple[str, list[Any], str]]:
    """Content, calls and finish reason of each choice of a stream, put together as clients do."""
    choices: dict[int, tuple[list[str], list[Any], list[str]]] = {}
    for chunk in client.chat.completions.create(model="stub", stream=True, **arguments):
        for choice in chunk.choices:
            content, calls, reasons = choices.setdefault(choice.index, ([], [], []))
            content.append(choice.delta.content or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for part in choice.delta.tool_calls or ():
                if part.id is not None:
                    assert part.index == len(calls) and part.type == "function"
                    calls.append((part.function.name, ""))
                name, before = calls[part.index]
                calls[part.index] = (name, before + part.function.arguments)
    return [("".join(c), calls, *reasons) for _, (c, calls, reasons) in sorted(choices.items())]


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]


HERMES = {
    'Sure.\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>': (
        "Sure.",
        [("get_time", "{}")],
    ),
    '<tool_call>{"name":"get_weather","arguments":{"city":"}\\"{","at":[{}]}}</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>': (
        None,
        [("get_weather", '{"city":"}\\"{","at":[{}]}'), ("get_time", "{}")],
    ),
}
ONE_CALL, TWO_CALLS = HERMES
LLAMA = {
    '{"name": "get_time", "parameters": {}}': (None, [("get_time", "{}")]),
    '<|python_tag|>{"name": "get_time", "parameters": {"a": 1}}; '
    '{"name": "get_time", "parameters": {}}': (
        None,
        [("get_time", '{"a": 1}'), ("get_time", "{}")],
    ),
}
NO_CALL = [
    "Just text, with a <tool_cal and a } in it. ",
    '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "get_time"}\n</tool_call>',
    '<tool_call>\n{"name": "get_time", "arguments": "x"}\n</tool_call> and on',
    "<tool_call>",
    "<tool_call>\n<tool_call>",
    "<tool_call></tool_call>",
    '{"name": "get_time", "arguments": {}',
    " \n",
]


@pytest.mark.parametrize("text", HERMES)
def test_calls_in_hermes_style(parrot: httpx.Client, text: str) -> None:
    content, calls = HERMES[text]
    choice = ask(parrot, text)
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, calls_of(choice.message)) == (content, calls)
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids) and all(id_.startswith("call_") for id_ in ids)


@pytest.mark.parametrize("text", LLAMA)
def test_calls_in_llama_style(llama: httpx.Client, text: str) -> None:
    choice = ask(llama, text)
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, calls_of(choice.message)) == LLAMA[text]


@pytest.mark.parametrize("text", [*HERMES, *NO_CALL])
def test_streaming_says_the_same(parrot: httpx.Client, text: str) -> None:
    choice = ask(parrot, text)
    expected = (choice.message.content or "", calls_of(choice.message), choice.finish_reason)
    messages = [{"role": "user", "content": text}]
    client = openai_client(parrot)
    assert streamed(client, messages=messages, tools=TOOLS, n=2) == [expected] * 2


def test_arguments_are_streamed_as_they_come() -> None:
    """A byte of theirs is a token; how many of them make an event is a matter of time."""
    body = {"messages": [{"role": "user", "content": TWO_CALLS}], "tools": TOOLS, "stream": True}
    with (
        serving(Parrot(tokenizer(ECHO), step_seconds=0.003)) as parrot,
        parrot.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        events = [json.loads(line[6:]) for line in response.iter_lines() if "{" in line]
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert len(calls) > 2
    assert set(calls[0]) == {"index", "id", "type", "function"}
    assert calls[0]["function"]["name"] == "get_weather"
    assert all(len(delta.get("tool_calls", "1")) == 1 for delta in deltas)
    assert set(calls[1]) == {"index", "function"} and set(calls[1]["function"]) == {"arguments"}
    assert deltas[0]["role"] == "assistant" and all("content" not in d for d in deltas[:-1])


@pytest.mark.parametrize("text", NO_CALL)
def test_malformed_calls_come_back_as_text(parrot: httpx.Client, text: str) -> None:
    choice = ask(parrot, text)
    assert choice.message.content == text and choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("arguments", ["{nonsense}", '{"a": }', '{"a": 1', '{"a": "'])
def test_arguments_that_are_no_json_come_back_as_text(parrot: httpx.Client, arguments: str) -> None:
    text = f'Hm. <tool_call>{{"name": "get_time", "arguments": {arguments}'
    choice = ask(parrot, text)
    assert choice.message.content == text
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"


def test_one_call_where_no_more_are_wanted(parrot: httpx.Client) -> None:
    choice = ask(parrot, TWO_CALLS, parallel_tool_calls=False)
    assert [name for name, _ in calls_of(choice.message)] == ["get_weather"]


def test_without_tools_nothing_is_a_call(parrot: httpx.Client) -> None:
    text = ONE_CALL
    assert ask(parrot, text, tool_choice="none").message.content == text
    assert ask(parrot, text, tools=[]).message.content == text


@settings(max_examples=100, deadline=None)
@given(data=st.data(), style=st.sampled_from(sorted(STYLES)))
def test_borders_make_no_difference(data: st.DataObject, style: str) -> None:
    pieces = [
        *NO_CALL,
        *HERMES,
        *LLAMA,
        "</tool_call>",
        '{"name": "get_time", "parameters": {',
        "}",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=4)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=20)) | {0, len(text)})
    parts = [text[start:end] for start, end in pairwise(cuts)]
    assert read(style, parts) == read(style, [text])


def read(style: str, pieces: list[str]) -> tuple[str, list[tuple[str | None, str]]]:
    use = tool_use([Tool(**tool) for tool in TOOLS], None, None)
    assert use is not None
    reader = ToolCallReader(STYLES[style], use)
    parts = [part for piece in pieces for part in reader.feed(piece)] + [reader.finish()]
    calls: list[tuple[str | None, str]] = []
    for part in parts:
        if isinstance(part, CallPart):
            calls += [(part.name, "")] if part.id else []
            calls[part.index] = (calls[part.index][0], calls[part.index][1] + part.arguments)
    return "".join(part for part in parts if isinstance(part, str)), calls


@pytest.mark.parametrize("parser", ["hermes", "llama3"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_calls_are_made_where_they_must_be(parser: str, choice: Any) -> None:
    engine = Engine.from_source(tiny_source(), EngineConfig(max_num_sequences=8))
    options = {"messages": HELLO, "tools": TOOLS, "n": 4, "seed": 1, "parallel_tool_calls": False}
    with serving(engine, tool_parser=parser) as http:
        client = openai_client(http)
        answer = client.chat.completions.create(model="stub", tool_choice=choice, **options)
        stream = streamed(client, tool_choice=choice, **options)
    called = [calls_of(option.message) for option in answer.choices]
    assert stream == [("", calls, "tool_calls") for calls in called]
    assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}
    for ((name, arguments),) in called:
        values = json.loads(arguments)
        if name == "get_weather":
            assert set(values) == {"city", "unit"} and len(values["city"]) <= 6
        else:
            assert (name, values) == ("get_time", {}) and choice == "required"


RENDER = """{# <tool_call> #}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] -%}
{{ c.id }}={{ c.function.name }}{{ c.function.arguments.city or c.function.arguments }}
{%- endfor %}{{ m.tool_call_id }}{% endfor %}"""


def test_what_the_template_writes_must_be_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "\ud800", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    with serving(stub_engine(tokenizer(RENDER))) as http:
        content = json.dumps({"messages": messages})
        headers = {"content-type": "application/json"}
        error = refusal(http.post("/v1/chat/completions", content=content, headers=headers), 400)
        assert "surrogate" in error["message"]


def test_the_template_is_given_tools_and_calls_and_results() -> None:
    call = {"id": "c1", "type": "function"}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "function_call": None,
            "tool_calls": [
                call | {"function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
                call | {"function": {"name": "get_time", "arguments": "{broken"}},
                call | {"function": {"name": "get_time", "arguments": "[" * 1500}},
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]
    with serving(stub_engine(tokenizer(RENDER))) as http:
        tokens = http.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()[
            "tokens"
        ]
        prompt = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        body = {"messages": messages, "tools": TOOLS, "max_tokens": 1}
        usage = http.post("/v1/chat/completions", json=body).json()["usage"]
        silent = http.post("/v1/chat/completions", json={**body, "tool_choice": "none"}).json()
    assert prompt == (
        "[get_weather][get_time]<system>Be brief.<user>Weather?"
        "<assistant>c1=get_weatherRomec1=get_time{brokenc1=get_time" + "[" * 1500 + "<tool>sunnyc1"
    )
    assert usage["prompt_tokens"] == len(prompt)
    assert silent["usage"]["prompt_tokens"] == len(prompt) - len("[get_weather][get_time]")


def test_an_answer_of_json_or_a_call() -> None:
    """Both at once: the model may choose, and does, but must write one or the other."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    body = {
        "messages": HELLO,
        "tools": [TIME],
        "n": 32,
        "seed": 2,
        "temperature": 100,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}},
        },
    }
    engine = Engine.from_source(tiny_source(), EngineConfig(max_num_sequences=32))
    with serving(engine, tool_parser="hermes") as http:
        choices = http.post("/v1/chat/completions", json=body).json()["choices"]
    answers = [choice["message"] for choice in choices if choice["finish_reason"] == "stop"]
    assert 0 < len(answers) < len(choices)
    assert all(json.loads(answer["content"])["n"] in (1, 2) for answer in answers)
    assert all("tool_calls" in c["message"] for c in choices if c["message"] not in answers)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"tool_choice": "always"}, "tool_choice", "required"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools", "pattern"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "required"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, None, "tool_cho"),
        ({"structured_outputs": {"regex": "a"}}, None, "tool_choice"),
        ({"tool_choice": "required", "min_tokens": 3}, None, "min_tokens"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        ({"functions": []}, "functions", "not supported"),
    ],
)
def test_refusals(parrot: httpx.Client, changes: Any, field: str | None, message: str) -> None:
    body = {"messages": HELLO, "tools": TOOLS, **changes}
    error = refusal(parrot.post("/v1/chat/completions", json=body), 400)
    assert message in error["message"] and field in (None, error["param"])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user", "content": "x", "tool_call_id": "c1"},
        {
            "role": "user",
            "content": "x",
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
        },
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant"},
    ],
)
def test_messages_that_make_no_sense(parrot: httpx.Client, message: Any) -> None:
    error = refusal(parrot.post("/v1/chat/completions", json={"messages": [message]}), 400)
    assert error["param"] == "messages"


def test_a_schema_that_cannot_be_kept_to_is_refused() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    body = {"messages": HELLO, "tools": [bad], "tool_choice": "required"}
    with serving(Engine.from_source(tiny_source(), EngineConfig()), tool_parser="hermes") as http:
        error = refusal(http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "tools" and "not" in error["message"]


def test_a_model_that_was_taught_no_calls() -> None:
    with serving(stub_engine()) as http:
        body = {"messages": HELLO, "tools": TOOLS}
        error = refusal(http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "tools" and "--tool-parser" in error["message"]


def test_the_style_is_read_from_the_template() -> None:
    llama = '{% if tools %}Respond with {"name": ..., "parameters": ...}{% endif %}'
    assert style_of(ECHO) is STYLES["hermes"] and style_of(llama) is STYLES["llama3"]
    assert style_of(None) is style_of("{{ messages }}") is style_of("{{ tools }}") is None
    assert style_of(None, "llama3") is style_of(ECHO, "llama3") is STYLES["llama3"]
