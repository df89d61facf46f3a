"""Rotary tables against their formulas, evaluated one position at a time in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qserve.kernels.kv_append import apply_rope
from qserve.models.config import ModelConfig
from qserve.models.rope import rope_table
from qserve.testing.tiny import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(scaling: dict[str, object] | None, **changes: object) -> ModelConfig:
    return ModelConfig.from_hf(tiny_config(rope_scaling=scaling, **changes))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_table_is_cosines_then_sines(head_dim: int) -> None:
    table = rope_table(config(None, head_dim=head_dim), 300)
    assert table.shape == (300, head_dim) and table.dtype == torch.float32
    for position in (0, 1, 255, 299):
        for pair in (0, 1, head_dim // 2 - 1):
            angle = position * 10000.0 ** (-2 * pair / head_dim)
            cosine, sine = table[position, pair], table[position, head_dim // 2 + pair]
            assert cosine.item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sine.item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_far_positions_keep_float32_accuracy() -> None:
    """A table computed in float32 would be off by 1e-2 here."""
    table = rope_table(config(None), 131072)
    assert table[131071, 32].item() == pytest.approx(math.sin(131071.0), abs=1e-7)


def test_linear_scaling_stretches_positions() -> None:
    scaled = rope_table(config({"rope_type": "linear", "factor": 4.0}), 401)
    assert torch.equal(scaled[::4], rope_table(config(None), 101))


def test_dynamic_scaling_grows_the_base_past_the_trained_range() -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    table = rope_table(config(scaling, max_position_embeddings=32), 100)
    assert torch.equal(table[:32], rope_table(config(None), 32))
    for position in (32, 99):
        base = 10000.0 * (2.0 * (position + 1) / 32 - 1.0) ** (64 / 62)
        angle = position * base ** (-10 / 64)
        assert table[position, 5].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 3.0}])
def test_scaled_frequencies_equal_hugging_face(scaling: dict[str, object]) -> None:
    theirs = LlamaConfig(**tiny_config(rope_parameters={**scaling, "rope_theta": 5e5}))
    frequencies, _ = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](theirs, "cpu")
    table = rope_table(config(scaling, rope_theta=5e5), 2)
    torch.testing.assert_close(table[1, 32:].asin(), frequencies, rtol=1e-5, atol=0)


def test_llama3_scaling_touches_only_slow_frequencies() -> None:
    plain = rope_table(config(None, rope_theta=5e5), 2)[1, 32:]
    scaled = rope_table(config(LLAMA3, rope_theta=5e5), 2)[1, 32:]
    ratio = plain.asin() / scaled.asin()
    torch.testing.assert_close(ratio[:15], torch.ones(15))
    torch.testing.assert_close(ratio[-10:], torch.full((10,), 8.0), rtol=1e-4, atol=0)
    assert (ratio.diff() > -1e-4).all()


def test_scores_depend_on_distance_alone() -> None:
    table = rope_table(config(None), 64)
    query, key = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(query_position: int, key_position: int) -> float:
        rotated_query = apply_rope(query, table[None, query_position])
        rotated_key = apply_rope(key, table[None, key_position])
        return float((rotated_query * rotated_key).sum())

    assert score(40, 33) == pytest.approx(score(12, 5), abs=1e-4)
    assert abs(score(40, 33) - score(12, 9)) > 1e-2
