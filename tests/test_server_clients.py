"""Clients that others wrote drive the server as they are: openai, LangChain, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field
from server_helpers import HELLO, openai_client, serving

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.testing.tiny import tiny_source


class Weather(BaseModel):
    """How it is outside."""

    model_config = ConfigDict(extra="forbid")

    sky: Literal["clear", "clouds"]
    place: str = Field(max_length=5)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """With a random model, which writes what it must and otherwise noise."""
    engine = Engine.from_source(tiny_source(), EngineConfig(max_num_sequences=8))
    with serving(engine, tool_parser="hermes", api_keys=("secret",)) as http:
        yield http


@pytest.fixture
def client(http: httpx.Client) -> openai.OpenAI:
    return openai_client(http).with_options(api_key="secret")


@pytest.fixture
def langchain(http: httpx.Client) -> ChatOpenAI:
    return ChatOpenAI(
        model="stub",
        base_url=str(http.base_url.join("/v1")),
        api_key="secret",
        seed=3,
        max_tokens=200,
        max_retries=0,
        stream_usage=True,
    )


def curl(http: httpx.Client, path: str, *options: str) -> str:
    program = shutil.which("curl")
    assert program is not None
    command = [program, "-sS", "-N", "-H", "Authorization: Bearer secret", *options]
    done = subprocess.run(
        [*command, str(http.base_url.join(path))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(http: httpx.Client) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 5, "stream": True})
    headers = ("-H", "Content-Type: application/json")
    lines = curl(http, "/v1/chat/completions", *headers, "-d", body).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert len([line for line in lines if line.startswith("data: {")]) >= 1
    assert json.loads(curl(http, "/v1/models"))["data"][0]["id"] == "stub"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub"]
    assert client.models.retrieve("stub").owned_by == "qserve"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.models.retrieve("gpt-9")


def test_fields_that_do_not_matter_here_are_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="stub",
        messages=HELLO,
        max_tokens=3,
        max_completion_tokens=3,
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
    )
    assert answer.usage is not None and answer.usage.completion_tokens <= 3


def test_a_conversation_goes_on_with_what_was_answered(client: openai.OpenAI) -> None:
    """The message as the client holds it, nulls and all, comes back in the next request."""
    tools = [openai.pydantic_function_tool(Weather)]
    asked: dict[str, Any] = {"model": "stub", "tools": tools, "seed": 1, "max_tokens": 200}
    message = (
        client.chat.completions.create(messages=HELLO, tool_choice="required", **asked)
        .choices[0]
        .message
    )
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "fine"}
    for said in (message, message.model_dump()):
        again = client.chat.completions.create(messages=[*HELLO, said, result], **asked)
        assert again.choices[0].finish_reason in ("stop", "length")


def test_the_stream_helper_parses_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="stub",
        messages=HELLO,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=5,
    ) as stream:
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    assert kinds.count("tool_calls.function.arguments.delta") > 5


def test_usage_so_far_in_every_event(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model="stub",
        prompt="x",
        max_tokens=6,
        stream=True,
        stream_options=options,
        extra_body={"ignore_eos": True},
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts == sorted(counts) and counts[-2:] == [6, 6]


def test_langchain_invokes_and_streams(langchain: ChatOpenAI) -> None:
    whole = langchain.invoke("hello")
    assert whole.usage_metadata["output_tokens"] <= 200
    parts = list(langchain.stream("hello"))
    assert "".join(part.content for part in parts) == whole.content
    assert sum(p.usage_metadata["output_tokens"] for p in parts if p.usage_metadata) > 0
    assert len(langchain.batch(["a", "b"])) == 2


def test_langchain_calls_tools(langchain: ChatOpenAI) -> None:
    forced = langchain.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    (call,) = forced.invoke("hello").tool_calls
    assert Weather(**call["args"]) and call["name"] == "Weather"
    whole = None
    for part in forced.stream("hello"):
        whole = part if whole is None else whole + part
    assert [c["args"] for c in whole.tool_calls] == [call["args"]]
    assert langchain.bind_tools([Weather]).invoke("hello").tool_calls == []


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_parses_structured_output(langchain: ChatOpenAI, method: str) -> None:
    parsed = langchain.with_structured_output(Weather, method=method).invoke("hello")
    assert isinstance(parsed, Weather)
