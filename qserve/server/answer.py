"""From what the engine produces to the OpenAI API's answers, whole or in parts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from qserve.engine.request import RequestOutput, SequenceOutput, TokenLogprob
from qserve.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from qserve.server.text import TextCodec


@dataclass(frozen=True)
class Span:
    """A stretch of one choice: its text, its tokens, and how it ended, if it did.

    logprobs: None unless asked for; an entry is None for the first token of a prompt.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing that a client would see."""
        return not self.text and not self.logprobs and self.finish_reason is None


def _as_span(choice: int, part: SequenceOutput) -> Span:
    reason = None if part.finish_reason is None else part.finish_reason.value
    return Span(choice, part.text, part.token_ids, part.logprobs, reason, part.stop_reason)


def _join(spans: Sequence[Span]) -> Span:
    """The whole of one choice from its stretches."""
    scored = spans[-1].logprobs is not None
    return Span(
        choice=spans[0].choice,
        text="".join(span.text for span in spans),
        token_ids=tuple(token for span in spans for token in span.token_ids),
        logprobs=tuple(e for span in spans for e in span.logprobs or ()) if scored else None,
        finish_reason=spans[-1].finish_reason,
        stop_reason=spans[-1].stop_reason,
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
        stretches: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            stretches[span.choice].append(span)
        return self._whole([_join(stretches[choice]) for choice in sorted(stretches)])

    @abstractmethod
    def _whole(self, choices: Sequence[Span]) -> BaseModel: ...

    @abstractmethod
    def part(self, span: Span) -> BaseModel:
        """One event of a stream."""

    @abstractmethod
    def closing(self) -> BaseModel:
        """The event with the usage that ends a stream, where it was asked for."""


class CompletionAnswer(Answer):
    """Answers /v1/completions. echoed: the prompts, if they are to be part of the text."""

    id_prefix = "cmpl"

    def __init__(
        self,
        model: str,
        codec: TextCodec,
        num_choices: int,
        echoed: Sequence[Sequence[int]] | None,
    ) -> None:
        super().__init__(model, codec, num_choices)
        self._echoed = echoed
        self._text_length: dict[int, int] = defaultdict(int)

    def take(self, prompt: int, output: RequestOutput) -> Iterator[Span]:
        is_first = prompt not in self._prompt_tokens
        if is_first and self._echoed is not None:
            token_ids = tuple(self._echoed[prompt])
            text = self._codec.decode(token_ids)
            for index in range(self._num_choices):
                choice = prompt * self._num_choices + index
                yield Span(choice, text, token_ids, output.prompt_logprobs)
        yield from super().take(prompt, output)

    def part(self, span: Span) -> Completion:
        return Completion(**self._heading, choices=[self._choice(span)])

    def closing(self) -> Completion:
        return Completion(**self._heading, choices=[], usage=self.usage)

    def _whole(self, choices: Sequence[Span]) -> Completion:
        worded = [self._choice(span) for span in choices]
        return Completion(**self._heading, choices=worded, usage=self.usage)

    def _choice(self, span: Span) -> CompletionChoice:
        return CompletionChoice(
            index=span.choice,
            text=span.text,
            logprobs=None if span.logprobs is None else self._logprobs(span, span.logprobs),
            finish_reason=span.finish_reason,
            stop_reason=span.stop_reason,
        )

    def _logprobs(self, span: Span, entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        tokens = [self._codec.spell(token)[0] for token in span.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._text_length[span.choice])
            self._text_length[span.choice] += len(token)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[entry.logprob if entry else None for entry in entries],
            top_logprobs=[self._top(entry) if entry else None for entry in entries],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By spelling; of tokens spelled alike (parts of characters), the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._codec.spell(token)[0], logprob)
        return top


class ChatAnswer(Answer):
    """Answers /v1/chat/completions."""

    id_prefix = "chatcmpl"

    def __init__(self, model: str, codec: TextCodec, num_choices: int) -> None:
        super().__init__(model, codec, num_choices)
        self._introduced: set[int] = set()

    def part(self, span: Span) -> ChatCompletionChunk:
        is_first = span.choice not in self._introduced
        self._introduced.add(span.choice)
        choice = ChunkChoice(
            index=span.choice,
            delta=Delta(role="assistant" if is_first else None, content=span.text),
            logprobs=self._logprobs(span),
            finish_reason=span.finish_reason,
            stop_reason=span.stop_reason,
        )
        return ChatCompletionChunk(**self._heading, choices=[choice])

    def closing(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._heading, choices=[], usage=self.usage)

    def _whole(self, choices: Sequence[Span]) -> ChatCompletion:
        worded = [
            ChatChoice(
                index=span.choice,
                message=AssistantMessage(content=span.text),
                logprobs=self._logprobs(span),
                finish_reason=span.finish_reason,
                stop_reason=span.stop_reason,
            )
            for span in choices
        ]
        return ChatCompletion(**self._heading, choices=worded, usage=self.usage)

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
