"""Models as GGUF files, written as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
from torch import Tensor

from qserve.models.config import ModelConfig
from qserve.testing.tiny import MemorySource

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to the rows of q and k."""
    return weight.reshape(heads, 2, 32, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    source: MemorySource,
    architecture: str,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    add_tokenizer: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **settings: Any,
) -> Path:
    """The source as llama.cpp would store it, without a tokenizer but for what `add_tokenizer` adds.

    kinds: how tensors are quantized, by our names; float32 if not named. settings: metadata of the
    architecture, "__" for dots, or further tensors.
    """
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, source.config)
    add_tokenizer(writer)
    for key, value in settings.items():
        name = key.replace("__", ".")
        if isinstance(value, numpy.ndarray):
            writer.add_tensor(name, value)
        else:
            writer.add_key_value(
                f"{architecture}.{name}", value, gguf.GGUFValueType.get_type(value)
            )
    for name, tensor in source.tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = pairs_from_halves(tensor, tensor.shape[0] // 64)
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(gguf_name(name), gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    if config.num_kv_heads != config.num_heads:
        writer.add_head_count_kv(config.num_kv_heads)
    if config.head_dim != config.hidden_size // config.num_heads:
        writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_eos_token_id(2)
