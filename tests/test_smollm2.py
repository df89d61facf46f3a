"""The engine on a real model, SmolLM2-135M-Instruct rounded to W4A8KV4: its tokens are naive's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from qserve import SamplingParams
from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.kv_cache import kv_format_of
from qserve.formats.checkpoint import QuantizationConfig
from qserve.models.decoder import Decoder
from qserve.models.loader import load_decoder
from qserve.models.source import open_source
from qserve.testing.naive import naive_generate
from qserve.testing.tiny import MemorySource, quantized_source

pytestmark = pytest.mark.slow

SHARED = (
    "The Hadamard transform is an example of a generalized class of Fourier transforms. It performs "
    "an orthogonal, symmetric, involutive, linear operation on real numbers. It can be regarded as "
    "being built out of size-two discrete Fourier transforms, and is in fact equivalent to a "
    "multidimensional one of size two in every dimension."
)
KV4 = QuantizationConfig(group_size=64, kv_bits=4, k_hadamard=True)
PROMPTS = (SHARED + " Its inverse", SHARED + " A quantizer", "The capital of France is")
PARAMS = (
    SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=14, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True),
    SamplingParams(max_tokens=14, temperature=0.0, repetition_penalty=1.2, ignore_eos=True),
)


@dataclass(frozen=True)
class Model:
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def model() -> Model:
    gguf = open_source("smollm2-135m")
    source = MemorySource(gguf.hf_config, {name: gguf.tensor(name) for name in gguf.names()})
    decoder = load_decoder(quantized_source(source, lambda linear: 4), torch.float32)
    return Model(decoder, gguf.tokenizer())


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert len(prompts[0]) > 64, "the shared beginning must fill a page"
    kv_format = kv_format_of(model.decoder, KV4.kv_bits)
    return [
        naive_generate(model.decoder, prompt, params, kv_format, hadamard=True)
        for prompt, params in zip(prompts, PARAMS, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_pages": 16},
        {"num_pages": 16, "max_batched_tokens": 5, "max_num_sequences": 3},
        {"num_pages": 4, "max_batched_tokens": 40, "max_num_sequences": 3},
    ],
    ids=["together", "in chunks", "short of pages"],
)
def test_tokens_equal_naive_generation(
    model: Model, expected: list[list[int]], settings: dict[str, int]
) -> None:
    engine = Engine(model.decoder, model.tokenizer, EngineConfig(**settings), KV4)
    tokens: dict[str, list[int]] = {}
    for round_ in range(2):  # the second finds the first one's pages
        for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            engine.add_request(f"{round_} {index}", engine.tokenizer.encode(prompt), params)
        engine.add_request("aborted", engine.tokenizer.encode(PROMPTS[0]), PARAMS[0])
        for step in range(1000):
            if not engine.has_unfinished:
                break
            if step == 3:
                engine.abort("aborted")
            for output in engine.step():
                sequence = tokens.setdefault(output.request_id, [])
                sequence += output.outputs[0].token_ids
    engine.check_integrity()
    assert engine.stats.pages_used == 0
    assert engine.stats.cached_tokens > 0 or settings["num_pages"] == 4
    for round_ in range(2):
        assert [tokens[f"{round_} {index}"] for index in range(len(PROMPTS))] == expected
