"""Offline throughput: all requests at once, prefill inside the timing, EOS ignored."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from qserve.engine.engine import Engine
from qserve.engine.request import SamplingParams


@dataclass(frozen=True)
class Throughput:
    """What one run measured; rates are per second of wall time, prefill included."""

    requests: int
    input_len: int
    output_len: int
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    decode_tokens_per_second: float
    steps: int
    preemptions: int

    def to_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


def bench_throughput(
    engine: Engine, num_requests: int, input_len: int, output_len: int, warm_up: bool = True
) -> Throughput:
    """Serve `num_requests` random prompts greedily, each to exactly `output_len` tokens.

    The decode rate counts from the step that gave the last request its first token.
    """
    if warm_up:
        _serve(engine, min(num_requests, 2), min(input_len, 64), 2)
    preemptions = engine.stats.preemptions
    run = _serve(engine, num_requests, input_len, output_len)
    engine.check_integrity()
    tokens = num_requests * output_len
    return Throughput(
        requests=num_requests,
        input_len=input_len,
        output_len=output_len,
        seconds=run.end - run.start,
        output_tokens_per_second=tokens / (run.end - run.start),
        total_tokens_per_second=(tokens + num_requests * input_len) / (run.end - run.start),
        decode_tokens_per_second=run.tokens_after_prefill / max(run.end - run.prefilled, 1e-9),
        steps=run.steps,
        preemptions=engine.stats.preemptions - preemptions,
    )


@dataclass(frozen=True)
class _Run:
    start: float
    prefilled: float
    end: float
    tokens_after_prefill: int
    steps: int


def _serve(engine: Engine, num_requests: int, input_len: int, output_len: int) -> _Run:
    generator = torch.Generator().manual_seed(input_len)
    shape = (num_requests, input_len)
    prompts = torch.randint(engine.model.vocab_size, shape, generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    start = prefilled = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    started: set[str] = set()
    steps = tokens_after_prefill = 0
    while engine.has_unfinished:
        outputs = engine.step()
        steps += 1
        if len(started) == num_requests:
            tokens_after_prefill += len(outputs)
            continue
        started |= {output.request_id for output in outputs}
        prefilled = time.perf_counter()
    return _Run(start, prefilled, time.perf_counter(), tokens_after_prefill, steps)
