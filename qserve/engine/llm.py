"""The offline API: a model, prompts in, completions out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from rich.progress import Progress

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)
from qserve.engine.text import encode, encode_chat

Prompt = str | list[int]
"""Text, or token ids."""

Message = Mapping[str, Any]
"""With "role" and "content"."""


@dataclass
class Completion:
    """One generated text. Fields as in `SequenceOutput`, over the whole sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def extend(self, output: SequenceOutput) -> None:
        """Append what one step added."""
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += output.logprobs
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


@dataclass
class Generation:
    """What one prompt led to: `SamplingParams.n` completions."""

    prompt_token_ids: list[int]
    completions: list[Completion]
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """Of the first completion."""
        return self.completions[0].text

    def extend(self, output: RequestOutput) -> None:
        """Append what one step added."""
        self.cached_tokens = output.cached_tokens
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        for sequence_output in output.outputs:
            self.completions[sequence_output.index].extend(sequence_output)


class LLM:
    """A model, ready to generate.

    >>> llm = LLM("smollm2-135m-qoq", kv_bits=4)
    >>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        """Settings are the fields of EngineConfig."""
        self.engine = Engine.load(model, EngineConfig(**settings))
        self._request_ids = map(str, count())

    def generate(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        params: SamplingParams | None = None,
        progress: bool = False,
    ) -> list[Generation]:
        """Complete each prompt; the results come in the prompts' order.

        progress: show a bar of finished prompts. Raises RequestError before any work starts.
        """
        token_ids = [self._encode(prompt) for prompt in _as_list(prompts, int)]
        return self._run(token_ids, params or SamplingParams(), progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        progress: bool = False,
    ) -> list[Generation]:
        """Answer a conversation, or each of several. Otherwise as `generate`."""
        conversations = _as_list(messages, Mapping)
        token_ids = [encode_chat(self.engine.tokenizer, chat) for chat in conversations]
        return self._run(token_ids, params or SamplingParams(), progress)

    def _encode(self, prompt: Prompt) -> list[int]:
        return encode(self.engine.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)

    def _run(
        self, prompts: list[list[int]], params: SamplingParams, progress: bool
    ) -> list[Generation]:
        for prompt in prompts:
            self.engine.check_request(prompt, params)
        generations: dict[str, Generation] = {}
        try:
            for prompt, request_id in zip(prompts, self._request_ids, strict=False):
                completions = [Completion() for _ in range(params.n)]
                generations[request_id] = Generation(prompt, completions)
                self.engine.add_request(request_id, prompt, params)
            for output in self._outputs(len(prompts), progress):
                generations[output.request_id].extend(output)
        finally:  # an interrupt would leave some of them to the next call
            for request_id in generations:
                self.engine.abort(request_id)
        return list(generations.values())

    def _outputs(self, num_requests: int, progress: bool) -> Iterator[RequestOutput]:
        """All outputs until the engine is idle."""
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("generating", total=num_requests)
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    bar.advance(task, output.finished)
                    yield output


def _as_list(items: Any, part: type) -> list[Any]:
    """Several items as they are; a lone one, a text or a list of `part`, as a list of one."""
    lone = isinstance(items, str) or (bool(items) and isinstance(items[0], part))
    return [items] if lone else list(items)
