"""From what the engine produces to the OpenAI API's answers, whole or in parts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring
from typing import Any, NamedTuple
from uuid import uuid4

from pydantic import BaseModel

from qserve.engine.request import RequestOutput, SequenceOutput, TokenLogprob
from qserve.server.responses import PromptTokensDetails, Usage
from qserve.server.text import TextCodec
from qserve.server.tool_calls import CallPart

_MARK = "\0"
"""Stands for a text that is not known yet; a heading holds no such character."""


class Span(NamedTuple):
    """A stretch of one choice: its text, its tokens, and how it ended, if it did.

    logprobs: None unless asked for; an entry is None for the first token of a prompt.
    calls: of tools, taken out of the text.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    calls: tuple[CallPart, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing that a client would see."""
        has_content = self.text or self.logprobs or self.calls
        return not has_content and self.finish_reason is None

    @property
    def is_text_alone(self) -> bool:
        """Whether a client sees nothing of it but its text."""
        return self.finish_reason is None and self.logprobs is None and not self.calls


def _as_span(choice: int, part: SequenceOutput) -> Span:
    reason = None if part.finish_reason is None else part.finish_reason.value
    return Span(choice, part.text, part.token_ids, part.logprobs, reason, part.stop_reason)


def joined(spans: Iterable[Span]) -> list[Span]:
    """One stretch for each choice, from all its stretches in the order they came."""
    stretches: dict[int, list[Span]] = {}
    for span in spans:
        stretches.setdefault(span.choice, []).append(span)
    return [_join(of_one) for of_one in stretches.values()]


def _join(spans: Sequence[Span]) -> Span:
    if len(spans) == 1:
        return spans[0]
    scored = spans[-1].logprobs is not None
    return Span(
        choice=spans[0].choice,
        text="".join(span.text for span in spans),
        token_ids=tuple(token for span in spans for token in span.token_ids),
        logprobs=tuple(e for span in spans for e in span.logprobs or ()) if scored else None,
        finish_reason=spans[-1].finish_reason,
        stop_reason=spans[-1].stop_reason,
        calls=tuple(call for span in spans for call in span.calls),
    )


class Answer(ABC):
    """The answer to one HTTP request, fed with the engine's outputs for its prompts.

    num_choices: sequences per prompt; choices are numbered over all prompts.
    """

    id_prefix: str

    def __init__(self, model: str, codec: TextCodec, num_choices: int) -> None:
        self._heading: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._codec = codec
        self._num_choices = num_choices
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0
        self._introduced: set[int] = set()
        self._frames: dict[int, tuple[str, str]] = {}

    def take(self, prompt: int, output: RequestOutput) -> Iterator[Span]:
        """The stretches that one output for the `prompt`-th prompt adds; counts its tokens."""
        self._prompt_tokens[prompt] = output.prompt_tokens
        self._cached_tokens[prompt] = output.cached_tokens
        for part in output.outputs:
            self._completion_tokens += len(part.token_ids)
            yield _as_span(prompt * self._num_choices + part.index, part)

    @property
    def usage(self) -> Usage:
        prompt_tokens = sum(self._prompt_tokens.values())
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(self._cached_tokens.values())
            ),
        )

    def whole(self, spans: Iterable[Span]) -> BaseModel:
        """The answer that is not streamed, from all its stretches in the order they came."""
        return self._whole(sorted(joined(spans), key=lambda span: span.choice))

    @abstractmethod
    def _whole(self, choices: Sequence[Span]) -> BaseModel: ...

    def event(self, span: Span, usage: Usage | None = None) -> str:
        """One event of a stream, as JSON."""
        is_first = span.choice not in self._introduced
        if is_first or usage is not None or not span.is_text_alone:
            self._introduced.add(span.choice)
            return self._part(span, is_first, usage).model_dump_json()
        before, after = self._frame(span.choice)
        return f"{before}{encode_basestring(span.text)}{after}"

    def _frame(self, choice: int) -> tuple[str, str]:
        """What stands around the text in events that bring nothing else."""
        if choice not in self._frames:
            event = self._part(Span(choice, _MARK, (), None), False, None).model_dump_json()
            before, after = event.split(encode_basestring(_MARK))
            self._frames[choice] = (before, after)
        return self._frames[choice]

    @abstractmethod
    def _part(self, span: Span, is_first: bool, usage: Usage | None) -> BaseModel:
        """One event of a stream. is_first: the choice has had none yet."""

    @abstractmethod
    def closing(self) -> BaseModel:
        """The event with the usage that ends a stream, where it was asked for."""
