"""A GPU generates the CPU's texts, in any chunks, but for ties; and trouble leaves no page lost."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from smollm2_helpers import QUANTIZED_SMOLLM2, smollm2

from qserve.benchmark.dummy import DummySource
from qserve.benchmark.throughput import add_requests, random_prompts
from qserve.config import ConfigError, EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.llm import Completion
from qserve.engine.request import RequestError, SamplingParams
from qserve.models.source import open_source
from qserve.testing.agreement import Agreement, compare, greedy
from qserve.testing.tiny import tiny_config

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VOCABULARY = 32000
OPENINGS = (
    "The capital of France is",
    "Once upon a time there was a girl who",
    "Water boils when",
    "def quicksort(items):",
    "The three laws of thermodynamics say that",
    "In the year 1969, two men",
    "My favourite recipe begins with",
    "The difference between a virus and a bacterium is",
    "Dear Sir or Madam,",
    "To prove that there are infinitely many primes,",
    "The stock market fell because",
    "An octopus has",
    "Photosynthesis is the process by which",
    "The best way to learn a language is",
    "Shakespeare wrote",
    "If it rains tomorrow,",
    "The computer scientist Alan Turing",
    "A haiku about the sea:",
    "The train to Berlin leaves",
    "In conclusion, the results show",
)
SHARED = (
    "The Hadamard transform is an example of a generalized class of Fourier transforms. It performs "
    "an orthogonal, symmetric, involutive, linear operation on real numbers. It can be regarded as "
    "being built out of size-two discrete Fourier transforms, and is in fact equivalent to a "
    "multidimensional one of size two in every dimension. "
)


@cache
def middling_source() -> DummySource:
    """A model large enough to need every kind of tile."""
    config = tiny_config(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=5632,
        max_position_embeddings=4096,
        dtype="float16",
    )
    return DummySource(config, 128, DEVICE)


def middling_engine(**settings: Any) -> Engine:
    torch.manual_seed(0)
    defaults = {"max_num_sequences": 256, "max_model_len": 2048, "num_pages": 4096}
    return Engine.from_source(middling_source(), EngineConfig(**(defaults | settings)))


def smollm2_engine(**settings: Any) -> Engine:
    defaults = {"max_model_len": 1024, "num_pages": 4000}
    return Engine.from_source(smollm2(), EngineConfig(**(defaults | settings)))


@cache
def smollm2_prompts() -> list[list[int]]:
    """200 prompts of 4 to 250 tokens, many of which begin alike."""
    encode = open_tokenizer()
    beginnings = ("", "Answer briefly. ", SHARED, SHARED * 2, *(f"{n}. " * 3 for n in range(6)))
    return [encode(start + opening) for start in beginnings for opening in OPENINGS]


@cache
def open_tokenizer() -> Any:
    tokenizer = open_source(os.environ.get(QUANTIZED_SMOLLM2, "smollm2-135m")).tokenizer()
    return tokenizer.encode


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@cache
def cpu_texts(dtype: str) -> list[Completion]:
    engine = smollm2_engine(device="cpu", dtype=dtype, max_num_sequences=20)
    return greedy(engine, smollm2_prompts()[: len(OPENINGS)], 64)


@cache
def rounding() -> Agreement:
    """What activations of another width alone do on the CPU: rounding moves values across the
    borders of 8-bit and 4-bit codes, and the layers above enlarge it."""
    return compare(cpu_texts("float32"), cpu_texts("float16"))


WHOLE = {
    "max_batched_tokens": 1 << 15,
    "max_num_sequences": 200,
    "enable_prefix_caching": False,
}


@cache
def texts_of_whole_prompts() -> list[Completion]:
    return greedy(smollm2_engine(**WHOLE), smollm2_prompts(), 128)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batched_tokens": 211},
        {"max_batched_tokens": 64, "max_num_sequences": 32},
        {"max_batched_tokens": 333, "max_num_sequences": 100, "enable_prefix_caching": True},
    ],
    ids=["chunks of 211", "chunks of 64", "chunks of 333 and prefix hits"],
)
def test_tokens_are_the_same_in_other_chunks(settings: dict[str, int]) -> None:
    engine = smollm2_engine(**(WHOLE | settings))
    agreement = compare(texts_of_whole_prompts(), greedy(engine, smollm2_prompts(), 128))
    print(agreement)
    assert (engine.stats.cached_tokens > 0) == ("enable_prefix_caching" in settings)
    assert not agreement.divergences


def test_tokens_agree_after_preemptions_but_for_ties() -> None:
    """What was computed in decode is computed again in prefill."""
    engine = smollm2_engine(**(WHOLE | {"num_pages": 150}))
    agreement = compare(texts_of_whole_prompts(), greedy(engine, smollm2_prompts(), 128))
    print(agreement)
    assert engine.stats.preemptions > 0
    assert len(agreement.divergences) <= engine.stats.preemptions
    assert agreement.are_ties_within(rounding().noise)


def test_tokens_are_the_same_after_prefix_hits() -> None:
    engine = smollm2_engine(max_batched_tokens=1 << 15, max_num_sequences=200)
    reference = greedy(engine, smollm2_prompts(), 128)
    cached = engine.stats.cached_tokens
    agreement = compare(reference, greedy(engine, smollm2_prompts(), 128))
    print(agreement)
    assert engine.stats.cached_tokens > max(2 * cached, 3000)
    assert not agreement.divergences


def test_the_real_model_differs_from_the_cpu_by_no_more_than_rounding() -> None:
    engine = smollm2_engine(max_num_sequences=len(OPENINGS))
    texts = greedy(engine, smollm2_prompts()[: len(OPENINGS)], 64)
    agreement = compare(cpu_texts("float32"), texts)
    print("GPU:", agreement, "CPU in float16:", rounding(), sep="\n")
    assert agreement.typical < 1.3 * rounding().typical
    assert agreement.are_ties_within(rounding().noise)


def test_out_of_pages_the_earliest_still_advance_and_all_end() -> None:
    engine = middling_engine(num_pages=64, enable_prefix_caching=False)
    completions = greedy(engine, random_prompts(VOCABULARY, 60, 100), 100)
    assert engine.stats.preemptions > 0
    assert {len(completion.token_ids) for completion in completions} == {100}
    assert engine.stats.pages_used == 0


def test_aborts_in_mid_flight_leave_the_others_tokens_alone() -> None:
    engine = middling_engine(max_batched_tokens=1 << 16, enable_prefix_caching=False)
    prompts = random_prompts(VOCABULARY, 96, 150)
    expected = [completion.token_ids for completion in greedy(engine, prompts, 32)]
    add_requests(engine, prompts, 32)
    tokens: list[list[int]] = [[] for _ in prompts]
    draw, step = random.Random(1), 0
    while engine.has_unfinished:
        for output in engine.step():
            tokens[int(output.request_id)] += output.outputs[0].token_ids
        step += 1
        if step % 2:
            engine.abort(str(draw.randrange(1, 96, 2)))
    assert tokens[::2] == expected[::2]
    assert all(got == full[: len(got)] for got, full in zip(tokens, expected, strict=True))
    assert any(len(got) < 32 for got in tokens)
    engine.check_integrity()
    assert engine.stats.pages_used == 0


def test_what_cannot_fit_is_refused_and_the_engine_goes_on() -> None:
    engine = middling_engine(num_pages=8)
    with pytest.raises(RequestError, match="at most 512"):
        engine.add_request("long", [1] * 600, SamplingParams())
    assert len(greedy(engine, [[1] * 500], 12)[0].token_ids) == 12
    with pytest.raises(ConfigError, match=r"num_pages .* are free"):
        middling_engine(num_pages=1 << 28)
    with pytest.raises(ConfigError, match=r"a page .* are left"):
        middling_engine(num_pages=None, gpu_memory_utilization=1e-9)
    assert len(greedy(engine, [[1] * 500], 12)[0].token_ids) == 12
