"""A tiny engine, what it is asked, and what it should answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from qserve import SamplingParams
from qserve.config import EngineConfig
from qserve.engine.device import DevicePolicy
from qserve.engine.engine import Engine
from qserve.engine.kv_cache import kv_format_of
from qserve.engine.llm import Completion
from qserve.models.decoder import Decoder
from qserve.models.loader import load_decoder
from qserve.testing.naive import naive_generate
from qserve.testing.tiny import (
    quantized_source,
    tiny_config,
    tiny_source,
    tiny_tokenizer,
)

MAX_TOKENS = 10
TOKENIZER = tiny_tokenizer()
SHARED = [(7 * i) % 300 for i in range(130)]
PROMPTS = (
    [5],
    SHARED[:40],
    SHARED[:64],
    SHARED[:65],
    SHARED[:130],
    [*SHARED[:70], *range(50, 60)],
)
PARAMS = (
    SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=MAX_TOKENS, temperature=0, repetition_penalty=1.5),
    SamplingParams(max_tokens=MAX_TOKENS, seed=11),
    SamplingParams(
        max_tokens=MAX_TOKENS, seed=12, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01
    ),
    SamplingParams(
        max_tokens=MAX_TOKENS,
        seed=13,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        min_tokens=4,
        stop_token_ids=tuple(range(3, 320, 4)),
    ),
)


@cache
def tiny_decoder() -> Decoder:
    source = quantized_source(tiny_source(tiny_config()), lambda linear: 4)
    return load_decoder(source, torch.float32)


@cache
def expected_tokens(prompt: int, params: int, kv_bits: int = 4, index: int = 0) -> list[int]:
    kv_format = kv_format_of(tiny_decoder(), kv_bits)
    return naive_generate(tiny_decoder(), PROMPTS[prompt], PARAMS[params], kv_format, index)


def do_twice(work: Callable[[], None]) -> Callable[[], None]:
    """Records nothing: a replay does the work again, on the same static tensors."""
    work()
    return work


PLAIN = DevicePolicy.of(torch.device("cpu"))
AHEAD = replace(PLAIN, steps_ahead=1)
REPLAYED = replace(AHEAD, capture=do_twice)


def make_engine(policy: DevicePolicy | None = None, **settings: Any) -> Engine:
    defaults = {"max_num_sequences": 4, "max_batched_tokens": 64, "num_pages": 16, "kv_bits": 4}
    config = EngineConfig(**(defaults | settings))
    return Engine(tiny_decoder(), TOKENIZER, config, policy=policy)


def collect(
    engine: Engine,
    results: dict[str, dict[int, Completion]],
    prompt_scores: dict[str, object] | None = None,
) -> None:
    for output in engine.step():
        if prompt_scores is not None and output.prompt_logprobs is not None:
            prompt_scores[output.request_id] = output.prompt_logprobs
        for part in output.outputs:
            results.setdefault(output.request_id, {}).setdefault(part.index, Completion()).extend(
                part
            )
    engine.check_integrity()


def run_all(engine: Engine) -> dict[str, dict[int, Completion]]:
    results: dict[str, dict[int, Completion]] = {}
    while engine.has_unfinished:
        collect(engine, results)
    assert engine.stats.pages_used == engine.stats.running == engine.stats.waiting == 0
    return results


def run_one(engine: Engine, prompt: list[int], params: SamplingParams) -> Completion:
    engine.add_request("only", prompt, params)
    return run_all(engine)["only"][0]
