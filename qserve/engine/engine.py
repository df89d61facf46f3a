"""The engine: requests in, tokens and text out, one step at a time."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qserve.config import ConfigError, EngineConfig
from qserve.engine.block_pool import BlockPool
from qserve.engine.device import DevicePolicy
from qserve.engine.fitting import fit_runner
from qserve.engine.grammar import GrammarCompiler
from qserve.engine.kv_cache import kv_format_of
from qserve.engine.loading import UNQUANTIZED, load_model
from qserve.engine.logprobs import Place, ScoredTokens, score_prompts, score_sampled
from qserve.engine.output import RequestState
from qserve.engine.request import (
    FinishReason,
    RequestError,
    RequestOutput,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)
from qserve.engine.runner import StepOutput
from qserve.engine.sampler import Row, Sampler
from qserve.engine.scheduler import Scheduler, StepPlan
from qserve.engine.sequence import Sequence, SequenceStatus, sequence_seed
from qserve.engine.step import StepUnderWay
from qserve.formats.checkpoint import QuantizationConfig
from qserve.formats.layout import PAGE_TOKENS
from qserve.models.decoder import Decoder
from qserve.models.source import WeightSource, open_source


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics; the last four count from the engine's start."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int


class Engine:
    """Serves requests on one decoder with a paged cache. Not thread-safe: one thread owns it.

    quantization: what the checkpoint says of its cache; by default, that it is not quantized.
    policy: how the decoder's device is used; None is what suits it.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig,
        quantization: QuantizationConfig = UNQUANTIZED,
        policy: DevicePolicy | None = None,
    ) -> None:
        self._policy = policy or DevicePolicy.of(decoder.device)
        self.config = config
        self.tokenizer = tokenizer
        self.model = decoder.config
        self.max_model_len = _max_model_len(config, self.model.max_positions)
        self.kv_format = kv_format_of(decoder, config.kv_bits or quantization.kv_bits)
        self.limits = self._policy.limits(config, self.max_model_len)
        self._runner = fit_runner(
            decoder,
            self.kv_format,
            quantization.k_hadamard,
            config,
            self.limits,
            self._policy,
        )
        self._pool = BlockPool(self._runner.num_pages, PAGE_TOKENS)
        self._scheduler = Scheduler(
            self._pool,
            self.limits.max_num_sequences,
            self.limits.max_batched_tokens,
            self.max_model_len,
            config.enable_prefix_caching,
        )
        self._sampler = Sampler()
        self._under_way: deque[StepUnderWay] = deque()
        self._grammars = GrammarCompiler(tokenizer, self.model.vocab_size, self.model.eos_token_ids)
        self._requests: dict[str, RequestState] = {}
        self._num_prompt_tokens = self._num_cached_tokens = self._num_generated_tokens = 0

    @classmethod
    def load(cls, model: str | Path, config: EngineConfig) -> Engine:
        """Open a checkpoint directory, hub id or GGUF file and make it ready to serve.

        What the process has loaded by then is no longer looked at by Python's garbage collector.
        Raises ModelError if it cannot be read, ConfigError if it does not go with `config`.
        """
        return cls.from_source(open_source(str(model)), config)

    @classmethod
    def from_source(cls, source: WeightSource, config: EngineConfig) -> Engine:
        """As `load`, from a source that is already open."""
        loaded = load_model(source, config)
        engine = cls(loaded.decoder, loaded.tokenizer, config, loaded.quantization)
        gc.collect()
        gc.freeze()  # walking what stays in every full collection would stall all steps for 0.2 s
        return engine

    def prepare(self, params: SamplingParams) -> None:
        """Do beforehand what would hold up `add_request`: compile a grammar. Any thread may call.

        Raises RequestError if the grammar cannot be used.
        """
        if params.grammar is not None:
            self._grammars.check(params.grammar)

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raise RequestError, naming what is wrong, if the request could never be served."""
        self.prepare(params)
        self._scheduler.check_fits(len(prompt_token_ids))
        for name, token_ids in (
            ("prompt", prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            _check_token_ids(name, token_ids, self.model.vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.model.vocab_size:
                raise RequestError(
                    f"{name} {getattr(params, name)} exceeds the vocabulary of "
                    f"{self.model.vocab_size} tokens"
                )

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        """Queue a request. Raises RequestError, before anything changes, if it cannot be served."""
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        self.check_request(prompt_token_ids, params)
        sequences = [
            self._new_sequence(request_id, index, prompt_token_ids, params)
            for index in range(params.n)
        ]
        self._requests[request_id] = RequestState.start(sequences, self.tokenizer)
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._num_prompt_tokens += len(prompt_token_ids)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its pages; no output for it comes any more.

        Unknown ids pass.
        """
        request = self._requests.pop(request_id, None)
        for sequence in request.sequences if request else ():
            self._scheduler.finish(sequence, FinishReason.ABORT)

    def step(self) -> list[RequestOutput]:
        """Advance every running sequence by one step; return what each request gained.

        On a device that works while the host does, that is what the step before gained, and nothing
        after the first.

        If a step fails, or is interrupted, what it was to write is unknown: all requests are aborted,
        the prefix cache is forgotten, and the error is raised. The engine can go on with new requests.
        """
        try:
            return self._advance() if self.has_unfinished else []
        except BaseException:
            for request_id in tuple(self._requests):
                self.abort(request_id)
            self._under_way.clear()
            self._pool.forget()
            raise

    def _advance(self) -> list[RequestOutput]:
        plan = self._scheduler.schedule()
        if plan.chunks:
            self._under_way.append(self._launch(plan))
            if len(self._under_way) <= self._policy.steps_ahead:
                return []
        return self._collect(self._under_way.popleft())

    def _launch(self, plan: StepPlan) -> StepUnderWay:
        output = self._runner.run(plan)
        rows = [Row(chunk.sequence, chunk.end) for chunk in plan.chunks if chunk.samples]
        token_ids = self._sampler.sample(output.logits, rows)
        self._runner.remember(plan.sampled, token_ids)
        scored = score_sampled(rows, output.logits, token_ids)
        return StepUnderWay(plan, token_ids, [*scored, *self._score_prompts(plan, output)])

    def _score_prompts(self, plan: StepPlan, output: StepOutput) -> Iterator[ScoredTokens]:
        if output.hidden is not None:
            yield from score_prompts(plan, output.hidden, self._runner.logits)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            pages_used=self._pool.num_used,
            pages_total=self._pool.num_pages,
            prompt_tokens=self._num_prompt_tokens,
            cached_tokens=self._num_cached_tokens,
            generated_tokens=self._num_generated_tokens,
            preemptions=self._scheduler.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for; an idle engine uses none."""
        self._scheduler.check_integrity()
        assert self.has_unfinished or not self._pool.num_used, "an idle engine holds pages"

    def _new_sequence(
        self, request_id: str, index: int, prompt: list[int], params: SamplingParams
    ) -> Sequence:
        max_length = self._scheduler.max_length
        if params.max_tokens is not None:
            max_length = min(max_length, len(prompt) + params.max_tokens)
        end_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_token_ids |= frozenset(self.model.eos_token_ids)
        seed = sequence_seed(params.seed, index)
        guide = None
        if params.grammar is not None:
            guide = self._grammars.guide(params.grammar, end_token_ids)
        return Sequence(
            request_id, index, params, list(prompt), seed, max_length, end_token_ids, guide
        )

    def _collect(self, step: StepUnderWay) -> list[RequestOutput]:
        """Commit a step and return its outputs; ends sequences whose text reached a stop string."""
        token_ids, scores = step.wait()
        logprobs = self._take_scores(scores)
        gained: dict[str, list[SequenceOutput]] = {}
        for sequence in self._scheduler.commit(step.plan, token_ids):
            output = self._requests[sequence.request_id].advance(sequence, logprobs.get(sequence))
            gained.setdefault(sequence.request_id, []).append(output)
            if output.finish_reason is not None:
                self._scheduler.finish(sequence, output.finish_reason)
            self._num_generated_tokens += 1
        return [self._output(request_id, outputs) for request_id, outputs in gained.items()]

    def _take_scores(
        self, scores: Iterable[tuple[Place, TokenLogprob]]
    ) -> dict[Sequence, TokenLogprob]:
        """Keep the scores of prompts; return those of sampled tokens."""
        sampled: dict[Sequence, TokenLogprob] = {}
        for place, score in scores:
            sequence = place.sequence
            if place.position >= sequence.num_prompt_tokens:
                sampled[sequence] = score
            elif sequence.status is not SequenceStatus.FINISHED:
                self._requests[sequence.request_id].prompt_logprobs[place.position] = score
        return sampled

    def _output(self, request_id: str, outputs: list[SequenceOutput]) -> RequestOutput:
        output = self._requests[request_id].output(outputs)
        if output.finished:
            del self._requests[request_id]
            self._num_cached_tokens += output.cached_tokens
        return output


def _max_model_len(config: EngineConfig, limit: int) -> int:
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len {config.max_model_len} exceeds the model's own limit of {limit} tokens"
        )
    return config.max_model_len or limit


def _check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} holds {token_id!r}, which is not a token id below {vocab_size}"
            )
