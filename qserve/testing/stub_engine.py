"""An engine without a model: it repeats prompts, at any speed, and can be told to fail."""

from __future__ import annotations

import time
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qserve.engine.engine import EngineStats
from qserve.engine.request import (
    FinishReason,
    RequestError,
    RequestOutput,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)

PAGE_TOKENS = 64


@dataclass
class _StubRequest:
    prompt: tuple[int, ...]
    params: SamplingParams
    generated: int = 0

    @property
    def pages(self) -> int:
        return -(-(len(self.prompt) + self.generated) // PAGE_TOKENS) * self.params.n


class StubEngine:
    """Answers each request with its own prompt, over and over, up to `max_tokens`.

    step_seconds: how long a step takes. max_running: requests that advance in a step; the others
    wait. max_model_len: tokens of prompt and output together. Setting `failure` makes the next step
    raise it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        step_seconds: float = 0.0,
        max_running: int = 64,
        max_model_len: int = 4096,
    ) -> None:
        self.tokenizer = tokenizer
        self.failure: Exception | None = None
        self._step_seconds = step_seconds
        self._max_running = max_running
        self._max_model_len = max_model_len
        self._requests: dict[str, _StubRequest] = {}
        self._prompt_tokens = self._generated_tokens = 0
        self._next_step = time.perf_counter()

    def prepare(self, params: SamplingParams) -> None:
        raise RequestError("grammar needs a model")

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        if not 0 < len(prompt_token_ids) < self._max_model_len:
            raise RequestError(f"the prompt has {len(prompt_token_ids)} tokens, which do not fit")
        self._requests[request_id] = _StubRequest(tuple(prompt_token_ids), params)
        self._prompt_tokens += len(prompt_token_ids)

    def abort(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        if self.failure is not None:
            raise self.failure
        self._pace()
        running = list(self._requests.items())[: self._max_running]
        return [self._advance(request_id, request) for request_id, request in running]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def stats(self) -> EngineStats:
        running = min(len(self._requests), self._max_running)
        return EngineStats(
            running=running,
            waiting=len(self._requests) - running,
            pages_used=sum(request.pages for request in list(self._requests.values())[:running]),
            pages_total=self._max_running * self._max_model_len // PAGE_TOKENS,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=0,
            generated_tokens=self._generated_tokens,
            preemptions=0,
        )

    def _pace(self) -> None:
        """Sleep until the step is due; steps keep their rate even where a sleep takes too long."""
        now = time.perf_counter()
        self._next_step = max(self._next_step, now - self._step_seconds) + self._step_seconds
        time.sleep(max(0.0, self._next_step - now))

    def _advance(self, request_id: str, request: _StubRequest) -> RequestOutput:
        params, prompt = request.params, request.prompt
        token = prompt[request.generated % len(prompt)]
        request.generated += 1
        self._generated_tokens += params.n
        room = self._max_model_len - len(prompt)
        finished = request.generated >= min(params.max_tokens or room, room)
        if finished:
            del self._requests[request_id]
        outputs = tuple(self._output(index, token, params, finished) for index in range(params.n))
        scores = None
        if request.generated == 1 and params.prompt_logprobs is not None:
            scores = (None, *(_score(token, params.prompt_logprobs) for token in prompt[1:]))
        return RequestOutput(request_id, len(prompt), 0, outputs, finished, scores)

    def _output(
        self, index: int, token: int, params: SamplingParams, finished: bool
    ) -> SequenceOutput:
        scores = None if params.logprobs is None else (_score(token, params.logprobs),)
        reason = FinishReason.LENGTH if finished else None
        return SequenceOutput(index, self.tokenizer.decode([token]), (token,), scores, reason)


def _score(token: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, 1, ((token, -0.5), (0, -3.0))[:num_top])
