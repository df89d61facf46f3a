"""What config.json says of a model, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from qserve.models.config import ModelConfig, ModelError
from qserve.testing.tiny import LLAMA3_ROPE, tiny_config


def test_config_reads_both_spellings_of_rope() -> None:
    old = ModelConfig.from_hf(tiny_config(rope_theta=5e5, rope_scaling=LLAMA3_ROPE))
    new = tiny_config(rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5})
    del new["rope_theta"]
    assert ModelConfig.from_hf(new) == old
    assert old.rope.kind == "llama3" and old.rope.theta == 5e5


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 512),
        (LLAMA3_ROPE, 512),
        ({"type": "linear", "factor": 4.0}, 2048),
        ({"type": "dynamic", "factor": 2.0}, 1024),
    ],
)
def test_scaling_extends_the_context(scaling: dict[str, Any] | None, positions: int) -> None:
    assert ModelConfig.from_hf(tiny_config(rope_scaling=scaling)).max_positions == positions


def test_config_of_llama_1_has_defaults() -> None:
    values = tiny_config(hidden_size=256)
    for name in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings", "dtype"):
        del values[name]
    config = ModelConfig.from_hf(values)
    assert (config.head_dim, config.num_kv_heads, config.rope.theta) == (64, 4, 10000.0)
    assert not config.tie_word_embeddings and config.dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "none named"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_config_refuses_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_hf(tiny_config(**changes))


def test_config_refuses_windows_on_some_layers() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    with pytest.raises(ModelError, match="some layers"):
        ModelConfig.from_hf(tiny_config("Qwen2ForCausalLM", **windows))
    unused = tiny_config("Qwen2ForCausalLM", **{**windows, "use_sliding_window": False})
    assert ModelConfig.from_hf(unused).sliding_window is None


@pytest.mark.parametrize("layers", [2, 29])
def test_windows_begin_where_hugging_face_has_them_begin(layers: int) -> None:
    """At layer 28, if a Qwen2 does not say."""
    values = tiny_config("Qwen2ForCausalLM", use_sliding_window=True, num_hidden_layers=layers)
    theirs = Qwen2Config(**values).layer_types
    assert theirs.count("sliding_attention") == max(0, layers - 28)
    if layers > 28:
        with pytest.raises(ModelError, match="some layers"):
            ModelConfig.from_hf(values)
    else:
        assert ModelConfig.from_hf(values).sliding_window is None
