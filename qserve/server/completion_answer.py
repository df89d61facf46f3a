"""Answers of /v1/completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from qserve.engine.request import RequestOutput, TokenLogprob
from qserve.server.answer import Answer, Span
from qserve.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from qserve.server.text import TextCodec


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

    def _part(self, span: Span, is_first: bool, usage: Usage | None) -> Completion:
        return Completion(**self._heading, choices=[self._choice(span)], usage=usage)

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
