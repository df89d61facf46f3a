"""A runner fitted to its device: a cache of the size that is left, kernels and graphs at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from qserve.config import ConfigError, EngineConfig
from qserve.engine.device import DevicePolicy, StepLimits
from qserve.engine.graphs import batch_sizes
from qserve.engine.kv_cache import CacheShape, choose_num_pages
from qserve.engine.request import SamplingParams
from qserve.engine.runner import ModelRunner
from qserve.engine.sampler import Row, Sampler, draws_of
from qserve.engine.scheduler import ScheduledChunk, StepPlan
from qserve.engine.sequence import Sequence
from qserve.formats.kv import KVFormat
from qserve.kernels.draw import draw_tokens
from qserve.models.decoder import Decoder

_EVERYTHING = SamplingParams(temperature=0.5, top_k=9, top_p=0.5, min_p=0.1, presence_penalty=1)


def fit_runner(
    decoder: Decoder,
    kv_format: KVFormat,
    hadamard: bool,
    config: EngineConfig,
    limits: StepLimits,
    policy: DevicePolicy,
) -> ModelRunner:
    """A runner that is ready. Raises ConfigError, with what would fit, if the memory does not do."""
    try:
        trial = partial(ModelRunner, decoder, CacheShape(kv_format, 1, hadamard), limits)
        if policy.prepare is not None:
            steps = map(partial(partial, trial().run), _typical_steps(limits))
            policy.prepare((*steps, partial(_draw_each_way, decoder, limits)))
        num_pages = config.num_pages
        if num_pages is None:
            page_bytes = decoder.config.num_layers * kv_format.page_bytes
            reserved = _bytes_of_steps(trial, limits, policy)
            num_pages = choose_num_pages(config, limits, page_bytes, reserved, decoder.device)
        cache = CacheShape(kv_format, num_pages, hadamard)
        # The library's attention, which reads pages of 16 bits, must be told each step's lengths.
        capture = None if kv_format.bits == 16 else policy.capture
        runner = ModelRunner(decoder, cache, limits, capture)
        runner.warm_up()
        return runner
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the memory left beside the weights does not do for steps of "
            f"{limits.max_batched_tokens} tokens and {limits.max_num_sequences} sequences: lower "
            "max_batched_tokens, max_num_sequences or num_pages"
        ) from error


def _bytes_of_steps(
    trial: Callable[[], ModelRunner], limits: StepLimits, policy: DevicePolicy
) -> int:
    """What the largest steps take, of prompts and, in memory of their own, of decodes."""
    if policy.peak_bytes is None:
        return 0
    return sum(policy.peak_bytes(partial(_try, trial, plan)) for plan in _largest_steps(limits))


def _try(trial: Callable[[], ModelRunner], plan: StepPlan) -> None:
    """A runner's work on a step, and choosing its tokens in every way there is."""
    rows = [Row(chunk.sequence, chunk.end) for chunk in plan.chunks]
    Sampler().sample(trial().run(plan).logits, rows)


def _draw_each_way(decoder: Decoder, limits: StepLimits) -> list[Tensor]:
    """A token from logits as the decoder gives them, and as they are adjusted."""
    logits, rows = decoder.empty_logits(1)[:1], [Row(_chunk(1, 1, limits).sequence, 1)]
    draws = draws_of(rows, logits)
    return [draw_tokens(logits, draws), draw_tokens(logits.float(), draws)]


def _largest_steps(limits: StepLimits) -> Iterator[StepPlan]:
    """As many tokens as there may be, one context as long as it may be; and as many decodes."""
    most, longest = limits.max_num_sequences, limits.max_model_len - 1
    others = most - 1
    first = min(limits.max_batched_tokens - others, longest)
    each = (limits.max_batched_tokens - first) // others if others else 0
    chunks = [_chunk(first, longest, limits)]
    chunks += [_chunk(length, length, limits) for length in [min(each, longest)] * others if length]
    yield StepPlan(tuple(chunks))
    yield StepPlan(tuple(_chunk(1, longest, limits) for _ in range(most)))


def _typical_steps(limits: StepLimits) -> Iterator[StepPlan]:
    """Sizes for which kernels may differ; contexts of one split, and of several."""
    for size in batch_sizes(limits.max_num_sequences):
        yield StepPlan(tuple(_chunk(1, 1, limits) for _ in range(size)))
    length = 16
    while length < limits.max_batched_tokens:
        yield StepPlan((_chunk(min(length, limits.max_model_len - 1), length, limits),))
        length *= 2
    yield from _largest_steps(limits)


def _chunk(length: int, context: int, limits: StepLimits) -> ScheduledChunk:
    """The last `length` tokens of a sequence of `context` tokens, all on one page."""
    context = min(context, limits.max_model_len - 1)
    sequence = Sequence("", 0, _EVERYTHING, [0] * context, 0, limits.max_model_len)
    sequence.pages = [0] * limits.pages_for(context)
    return ScheduledChunk(sequence, context - length, length, True)
