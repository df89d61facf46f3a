"""Answers of /v1/chat/completions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from qserve.engine.request import FinishReason, RequestOutput, TokenLogprob
from qserve.server.answer import Answer, Span
from qserve.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    ChunkChoice,
    Delta,
    FunctionCallAnswer,
    ToolCallAnswer,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from qserve.server.text import TextCodec
from qserve.server.tool_calls import CallPart, ToolCallReader

CALLED = "tool_calls"
"""Why a choice is finished that calls tools."""


class ChatAnswer(Answer):
    """Answers /v1/chat/completions. new_reader: of the calls in one choice, if it may have any."""

    id_prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        codec: TextCodec,
        num_choices: int,
        new_reader: Callable[[], ToolCallReader] | None = None,
    ) -> None:
        super().__init__(model, codec, num_choices)
        self._readers = None if new_reader is None else defaultdict[int, ToolCallReader](new_reader)

    def take(self, prompt: int, output: RequestOutput) -> Iterator[Span]:
        for span in super().take(prompt, output):
            yield span if self._readers is None else _read(self._readers[span.choice], span)

    def _part(self, span: Span, is_first: bool, usage: Usage | None) -> ChatCompletionChunk:
        choice = ChunkChoice(
            index=span.choice,
            delta=Delta(
                role="assistant" if is_first else None,
                content=span.text if span.text or not span.calls else None,
                tool_calls=[_delta(call) for call in _joined(span.calls)] or None,
            ),
            logprobs=self._logprobs(span),
            finish_reason=span.finish_reason,
            stop_reason=span.stop_reason,
        )
        return ChatCompletionChunk(**self._heading, choices=[choice], usage=usage)

    def closing(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._heading, choices=[], usage=self.usage)

    def _whole(self, choices: Sequence[Span]) -> ChatCompletion:
        worded = [self._choice(span) for span in choices]
        return ChatCompletion(**self._heading, choices=worded, usage=self.usage)

    def _choice(self, span: Span) -> ChatChoice:
        message = _message(span)
        is_undone = span.finish_reason == CALLED and not message.tool_calls
        return ChatChoice(
            index=span.choice,
            message=message,
            logprobs=self._logprobs(span),
            finish_reason=FinishReason.STOP.value if is_undone else span.finish_reason,
            stop_reason=span.stop_reason,
        )

    def _logprobs(self, span: Span) -> ChatLogprobs | None:
        if span.logprobs is None:
            return None
        return ChatLogprobs(content=[self._token(entry) for entry in span.logprobs if entry])

    def _token(self, entry: TokenLogprob) -> ChatTokenLogprob:
        chosen = self._alternative(entry.token_id, entry.logprob)
        top = [self._alternative(token, logprob) for token, logprob in entry.top]
        return ChatTokenLogprob(**chosen.model_dump(), top_logprobs=top)

    def _alternative(self, token_id: int, logprob: float) -> TopLogprob:
        text, spelled = self._codec.spell(token_id)
        return TopLogprob(token=text, logprob=logprob, bytes=spelled)


def _read(reader: ToolCallReader, span: Span) -> Span:
    """The span, with the calls that its text completes taken out of what is certain of it."""
    parts = reader.feed(span.text)
    if span.finish_reason is not None:
        parts.append(reader.finish())
    has_called = span.finish_reason == FinishReason.STOP.value and reader.num_calls
    return span._replace(
        text="".join(part for part in parts if isinstance(part, str)),
        calls=tuple(part for part in parts if isinstance(part, CallPart)),
        finish_reason=CALLED if has_called else span.finish_reason,
    )


def _joined(parts: Iterable[CallPart]) -> Iterator[CallPart]:
    """One part for each call, from its stretches; clients expect no more of them in an event."""
    for _, of_one_call in groupby(parts, key=lambda part: part.index):
        first, *more = of_one_call
        yield replace(
            first,
            arguments=first.arguments + "".join(part.arguments for part in more),
            written=first.written + "".join(part.written for part in more),
        )


def _delta(part: CallPart) -> ToolCallDelta:
    return ToolCallDelta(
        index=part.index,
        id=part.id,
        type="function" if part.id else None,
        function=FunctionCallAnswer(name=part.name, arguments=part.arguments),
    )


def _message(span: Span) -> AssistantMessage:
    """The whole of a choice; calls whose arguments are no JSON go back to its text."""
    text, calls = span.text, []
    for call in _joined(span.calls):
        if _is_json(call.arguments):
            function = FunctionCallAnswer(name=call.name, arguments=call.arguments)
            calls.append(ToolCallAnswer(id=call.id or "", function=function))
        else:
            text += call.written
    return AssistantMessage(content=text if text or not calls else None, tool_calls=calls or None)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
