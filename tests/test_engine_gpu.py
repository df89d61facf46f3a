"""The engine on a GPU: graphs and steps ahead change no token, nor do the requests beside one."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.benchmark.breakdown import bench_breakdown
from qserve.benchmark.dummy import DummySource
from qserve.config import EngineConfig
from qserve.engine.device import DevicePolicy
from qserve.engine.engine import Engine
from qserve.engine.llm import Completion
from qserve.engine.request import SamplingParams
from qserve.engine.sampler import Rows, Sampler
from qserve.models.decoder import Decoder
from qserve.models.loader import load_decoder
from qserve.testing.tiny import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.gpu

VOCAB = 128256
PARAMS = (
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=25, seed=11, stop_token_ids=tuple(range(3, 320, 40))),
    SamplingParams(max_tokens=33, seed=12, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(max_tokens=30, seed=13, presence_penalty=0.5, frequency_penalty=0.5, logprobs=2),
    SamplingParams(max_tokens=70, temperature=0, repetition_penalty=1.5, min_tokens=20),
)


@cache
def decoder() -> Decoder:
    """Two layers as wide as an 8-billion-parameter model's, with its vocabulary."""
    config = tiny_config(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
    )
    return load_decoder(DummySource(config, device="cuda"), torch.float16, "cuda")


def make_engine(policy: DevicePolicy | None = None, **settings: Any) -> Engine:
    defaults = {"max_num_sequences": 256, "num_pages": 3000, "kv_bits": 4}
    config = EngineConfig(**(defaults | settings))
    return Engine(decoder(), tiny_tokenizer(), config, policy=policy)


def prompt(index: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(VOCAB, (length,), generator=generator).tolist()


def run_all(engine: Engine) -> dict[str, Completion]:
    completions: dict[str, Completion] = {}
    while engine.has_unfinished:
        for output in engine.step():
            for part in output.outputs:
                completions.setdefault(output.request_id, Completion()).extend(part)
        engine.check_integrity()
    return completions


def add_mixed_requests(engine: Engine) -> None:
    for index in range(60):
        length = (1, 63, 64, 65, 300, 2100)[index % 6]
        engine.add_request(str(index), prompt(index, length), PARAMS[index % len(PARAMS)])


def test_graphs_and_steps_ahead_change_nothing() -> None:
    policy = DevicePolicy.of(torch.device("cuda"))
    results = []
    for changes in ({}, {"capture": None}, {"capture": None, "steps_ahead": 0}):
        engine = make_engine(replace(policy, **changes), num_pages=600, max_batched_tokens=3000)
        add_mixed_requests(engine)
        results.append(run_all(engine))
    assert results[0] == results[1] == results[2]


class RecordingSampler(Sampler):
    """Keeps the logits of the sequences of one request."""

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, rows: Rows) -> Tensor:
        for row, own in zip(rows, logits, strict=True):
            if row.sequence.request_id == self.request_id:
                self.logits.append(own.clone())
        return super().sample(logits, rows)


def logits_of(engine: Engine, length: int) -> Tensor:
    engine._sampler = RecordingSampler("subject")
    engine.add_request("subject", prompt(0, length), PARAMS[0])
    run_all(engine)
    return torch.stack(engine._sampler.logits)


@pytest.mark.parametrize("length", [20, 1000, 2030])
def test_logits_are_the_same_bits_alone_and_among_256(length: int) -> None:
    engine = make_engine(enable_prefix_caching=False)
    alone = logits_of(engine, length)
    for index in range(1, 256):
        params = replace(PARAMS[0], max_tokens=10 + index % 50)
        engine.add_request(str(index), prompt(index, 5 + 3 * index), params)
    assert torch.equal(logits_of(engine, length), alone)


def test_a_row_of_the_head_is_the_same_bits_in_any_batch() -> None:
    head = decoder().lm_head
    hidden = torch.randn(600, 4096, device="cuda", dtype=torch.float16)
    whole = head(hidden)
    torch.testing.assert_close(whole, hidden @ head.weight.T)
    for rows in (1, 2, 16, 17, 64, 65, 130, 200, 256, 257, 300):
        out = head.empty(rows).fill_(math.nan)
        assert torch.equal(head(hidden[:rows], out), whole[:rows])


def test_pages_of_16_bits_are_served() -> None:
    engine = make_engine(kv_bits=16, num_pages=300)
    add_mixed_requests(engine)
    assert len(run_all(engine)) == 60


def test_requests_are_aborted_while_their_step_runs() -> None:
    engine = make_engine(num_pages=400)
    add_mixed_requests(engine)
    for index in range(60):
        engine.step()
        engine.abort(str(7 * index % 60))
        engine.check_integrity()
    assert not engine.has_unfinished or run_all(engine)
    assert engine.stats.pages_used == 0
    engine.add_request("after", prompt(3, 65), PARAMS[0])
    alone = make_engine()
    alone.add_request("after", prompt(3, 65), PARAMS[0])
    assert run_all(engine) == run_all(alone)


def test_two_thousand_requests_at_once_in_few_pages() -> None:
    engine = make_engine(num_pages=200)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    for index in range(2000):
        engine.add_request(str(index), prompt(index % 50, 5 + index % 50), params)
    completions = run_all(engine)
    for index in range(50, 2000):
        assert completions[str(index)].token_ids == completions[str(index % 50)].token_ids
    assert len(completions) == 2000 and engine.stats.pages_used == 0


def test_a_breakdown_is_of_whole_steps() -> None:
    batch, context = 3, 70
    engine = make_engine(max_num_sequences=batch, max_model_len=200)
    found = bench_breakdown(engine, 128, batch, context)
    launches = {part.name: part.launches for part in found.parts}
    assert launches["append"] == decoder().config.num_layers and launches["lm_head"] >= 1
    assert math.isclose(sum(part.microseconds for part in found.parts) + found.gaps, found.step)
    assert 0 < found.gaps < found.step
    assert context + 75 < found.context < context + 95
    engine.check_integrity()
    with pytest.raises(ValueError, match="too few for a breakdown"):
        bench_breakdown(engine, 128, batch, context=160)
