"""Offline throughput: all requests at once, prefill inside the timing, EOS ignored."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

import torch

from qserve.engine.engine import Engine
from qserve.engine.request import SamplingParams


@dataclass(frozen=True)
class Throughput:
    """What one run measured; rates are per second of wall time, prefill included.

    prefill_share: of the time, spent in steps that gave a request its first token.
    decode_step_ms: the median of the other steps at their largest batch, and what rate that is;
    0 if there are none.
    largest_batch: tokens that one step generated at most. pages_used: at most, at the end of a step.
    memory_bytes: of the device, in use at the end; 0 on a CPU.
    """

    requests: int
    input_len: int
    output_len: int
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    prefill_share: float
    decode_step_ms: float
    decode_tokens_per_second: float
    largest_batch: int
    steps: int
    preemptions: int
    pages_used: int
    pages_total: int
    memory_bytes: int

    def to_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """One step of a run: tokens it generated, those of them that were a request's first."""

    seconds: float
    tokens: int
    first_tokens: int
    pages_used: int


def bench_throughput(
    engine: Engine, num_requests: int, input_len: int, output_len: int
) -> Throughput:
    """Serve `num_requests` random prompts greedily, each to exactly `output_len` tokens.

    A short run goes before, whose prompts are as long but whose time does not count.
    """
    vocab_size = engine.model.vocab_size
    add_requests(engine, random_prompts(vocab_size, min(num_requests, 8), input_len), 4)
    drain(engine)
    prompts = random_prompts(vocab_size, num_requests, input_len, seed=1)
    preemptions = engine.stats.preemptions
    start = time.perf_counter()
    add_requests(engine, prompts, output_len)
    steps = drain(engine)
    seconds = time.perf_counter() - start
    engine.check_integrity()
    decode_batch, decode_seconds = _decoding(steps)
    tokens = num_requests * output_len
    return Throughput(
        requests=num_requests,
        input_len=input_len,
        output_len=output_len,
        seconds=seconds,
        output_tokens_per_second=tokens / seconds,
        total_tokens_per_second=(tokens + num_requests * input_len) / seconds,
        prefill_share=sum(step.seconds for step in steps if step.first_tokens) / seconds,
        decode_step_ms=1e3 * decode_seconds,
        decode_tokens_per_second=decode_batch / decode_seconds if decode_batch else 0.0,
        largest_batch=max(step.tokens for step in steps),
        steps=len(steps),
        preemptions=engine.stats.preemptions - preemptions,
        pages_used=max(step.pages_used for step in steps),
        pages_total=engine.stats.pages_total,
        memory_bytes=_memory_in_use(),
    )


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids; the prompts share no page."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(
        vocab_size, (count, length), generator=generator
    ).tolist()
    return prompts


def add_requests(engine: Engine, prompts: list[list[int]], output_len: int) -> None:
    """Queue a greedy request for exactly `output_len` tokens after each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)


def drain(engine: Engine) -> list[Step]:
    """Step until no request is left."""
    started: set[str] = set()
    steps = []
    before = time.perf_counter()
    while engine.has_unfinished:
        gained = {output.request_id for output in engine.step()}
        now = time.perf_counter()
        first_tokens = len(gained - started)
        steps.append(Step(now - before, len(gained), first_tokens, engine.stats.pages_used))
        started |= gained
        before = now
    return steps


def _decoding(steps: list[Step]) -> tuple[int, float]:
    """The largest batch that only decoded, and the median of its steps' seconds."""
    decoding = [step for step in steps if step.tokens and not step.first_tokens]
    if not decoding:
        return 0, 0.0
    largest = max(step.tokens for step in decoding)
    return largest, statistics.median(s.seconds for s in decoding if s.tokens == largest)


def _memory_in_use() -> int:
    if not torch.cuda.is_initialized():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free
