"""Streams lose nothing, however late their reader is, and events are what the API's models say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_helpers import stub_engine

from qserve.engine.request import RequestOutput, SamplingParams
from qserve.server.answer import Answer, Span, joined
from qserve.server.chat_answer import ChatAnswer
from qserve.server.completion_answer import CompletionAnswer
from qserve.server.shared_engine import ADMITTED, EngineFailedError, OutputStream
from qserve.server.text import TextCodec
from qserve.testing.tiny import tiny_tokenizer

CODEC = TextCodec(tiny_tokenizer())
ANSWERS = [
    lambda: ChatAnswer("model", CODEC, 2),
    lambda: CompletionAnswer("model", CODEC, 2, None),
]


def outputs(num_tokens: int, request_id: str) -> Iterator[RequestOutput]:
    engine = stub_engine()
    engine.add_request(request_id, [70, 71, 72], SamplingParams(max_tokens=num_tokens))
    while engine.has_unfinished:
        yield from engine.step()


def new_stream() -> tuple[OutputStream, str]:
    stream = OutputStream(1, 1, lambda _: None)
    return stream, next(iter(stream.request_ids))


def test_a_late_reader_gets_all_that_came_at_once() -> None:
    async def read() -> list[list[RequestOutput]]:
        stream, request_id = new_stream()
        stream.put(ADMITTED)
        for output in outputs(5, request_id):
            stream.put((output,))
        await stream.wait_until_admitted()
        return [batch async for batch in stream]

    (batch,) = asyncio.run(read())
    assert [len(part.token_ids) for output in batch for part in output.outputs] == [1] * 5
    assert batch[-1].finished


def test_what_came_before_an_error_is_not_lost() -> None:
    async def read() -> tuple[list[RequestOutput], str]:
        stream, request_id = new_stream()
        for output in list(outputs(5, request_id))[:3]:
            stream.put((output,))
        stream.put(EngineFailedError("out of memory"))
        seen: list[RequestOutput] = []
        with pytest.raises(EngineFailedError) as failure:
            async for batch in stream:
                seen += batch
        return seen, str(failure.value)

    seen, error = asyncio.run(read())
    assert len(seen) == 3 and error == "out of memory"


@pytest.mark.parametrize("new_answer", ANSWERS, ids=["chat", "completion"])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_events_are_written_as_their_models_are(new_answer: Any, texts: list[str]) -> None:
    answer: Answer = new_answer()
    for index, text in enumerate(texts):
        for choice in range(2):
            span = Span(choice, text, (1,), None)
            model = answer._part(span, index == 0, None)
            assert answer.event(span) == model.model_dump_json()


def test_an_event_that_brings_more_than_text_has_it() -> None:
    answer = ChatAnswer("model", CODEC, 1)
    for text in "ab":
        answer.event(Span(0, text, (1,), None))
    end = json.loads(answer.event(Span(0, "c", (1,), None, "stop", "x")))
    assert end["choices"][0]["finish_reason"] == "stop" and end["choices"][0]["stop_reason"] == "x"
    assert json.loads(answer.event(Span(0, "d", (1,), None), answer.usage))["usage"]


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=12))
def test_stretches_join_by_choice(stretches: list[tuple[int, str]]) -> None:
    spans = [Span(choice, text, (index,), None) for index, (choice, text) in enumerate(stretches)]
    whole = {span.choice: span for span in joined(spans)}
    assert set(whole) == {choice for choice, _ in stretches}
    for choice, span in whole.items():
        assert span.text == "".join(text for other, text in stretches if other == choice)
        assert span.token_ids == tuple(i for i, (c, _) in enumerate(stretches) if c == choice)
