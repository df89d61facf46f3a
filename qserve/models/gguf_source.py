"""A GGUF file as a source: its metadata as config.json, its tensors by their Hugging Face names."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qserve.models import names
from qserve.models.config import ModelError, RopeConfig, first_line
from qserve.models.rope import llama3_multipliers, unscaled_frequencies
from qserve.models.tokenizer import TIKTOKEN_SPLITS, load_gguf_tokenizer
from qserve.models.weight_source import WeightSource

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_OUTER_NAMES = {
    "token_embd.weight": names.EMBEDDING,
    "output_norm.weight": names.FINAL_NORM,
    "output.weight": names.LM_HEAD,
}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = RopeConfig(
    kind="llama3", original_max_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
)


class GGUFSource(WeightSource):
    """A `.gguf` file of the Llama family; tensors are dequantized to float32, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise ModelError(f"{path}: {first_line(error)}") from error
        except (ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{path}: not a whole GGUF file: {first_line(error)}") from error
        self._metadata = reader.fields
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture: str = self._required("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            raise ModelError(f"{path}: architecture {self.architecture!r} is not supported")
        if "token_embd.weight" not in self._stored:
            raise ModelError(f"{path}: tensor token_embd.weight is missing")
        self.hf_config = self._read_config()

    def names(self) -> set[str]:
        return set(self._stored_names)

    def tensor(self, name: str) -> Tensor:
        if name not in self._stored_names:
            raise ModelError(f"{self.path}: there is no tensor {name}")
        tensor = self._dequantize(self._stored_names[name])
        permuted = "self_attn.q_proj" in name or "self_attn.k_proj" in name
        if permuted and self.architecture == "llama":
            return _halves_from_pairs(tensor, self.config.head_dim)
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        split = self._optional("tokenizer.ggml.pre", "default")
        is_sentencepiece = self._optional("tokenizer.ggml.model") == "llama"
        begins = is_sentencepiece or split in TIKTOKEN_SPLITS  # unless the file says otherwise
        begins = self._optional("tokenizer.ggml.add_bos_token", begins)
        return load_gguf_tokenizer(self.path, split, begins)

    def save_tokenizer(self, directory: Path) -> None:
        self.tokenizer().save_pretrained(directory)

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """Hugging Face name -> name in the file."""
        return {_hf_name(stored): stored for stored in self._stored if stored != _ROPE_FACTORS}

    def _dequantize(self, stored: str) -> Tensor:
        tensor = self._stored[stored]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: {stored}: {error}") from error
        return torch.from_numpy(numpy.require(values, requirements="W"))

    def _read_config(self) -> dict[str, Any]:
        hidden, heads = self._setting("embedding_length"), self._setting("attention.head_count")
        head_dim = self._setting("attention.key_length", hidden // heads)
        return {
            "architectures": [_ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "hidden_size": hidden,
            "num_hidden_layers": self._setting("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._setting("feed_forward_length"),
            "max_position_embeddings": self._setting("context_length"),
            "vocab_size": int(self._stored["token_embd.weight"].shape[1]),
            "rms_norm_eps": self._setting("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self._stored,
            "attention_bias": "blk.0.attn_output.bias" in self._stored,
            "bos_token_id": self._optional("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._optional("tokenizer.ggml.eos_token_id"),
            "dtype": "float16",
            **self._rope(head_dim),
        }

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = self._setting("rope.freq_base", 10000.0)
        factor = self._optional(f"{self.architecture}.rope.scaling.factor")
        kind = self._setting("rope.scaling.type", "linear" if factor else "none")
        if _ROPE_FACTORS in self._stored:
            return {"rope_theta": theta, "rope_scaling": self._llama3_scaling(theta, head_dim)}
        if kind == "none":
            return {"rope_theta": theta}
        return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, "factor": factor}}

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The file holds divisors of the frequencies; Llama 3's own constants must give them."""
        divisors = self._dequantize(_ROPE_FACTORS).double()
        rope = replace(_LLAMA3_ROPE, theta=theta, factor=float(divisors.max()))
        expected = 1 / llama3_multipliers(rope, unscaled_frequencies(theta, head_dim))
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise ModelError(f"{self.path}: {_ROPE_FACTORS} is not the scaling of Llama 3")
        return {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }

    def _setting(self, key: str, default: Any = None) -> Any:
        """Metadata of the architecture; required where there is no default."""
        full_key = f"{self.architecture}.{key}"
        return self._required(full_key) if default is None else self._optional(full_key, default)

    def _optional(self, key: str, default: Any = None) -> Any:
        field = self._metadata.get(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        if key not in self._metadata:
            raise ModelError(f"{self.path}: metadata lacks {key}")
        return self._optional(key)


def _hf_name(stored: str) -> str:
    if stored in _OUTER_NAMES:
        return _OUTER_NAMES[stored]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if match is None or match[2] not in _LAYER_NAMES:
        return stored
    return f"{names.layer_prefix(int(match[1]))}{_LAYER_NAMES[match[2]]}.{match[3]}"


def _halves_from_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Undo the row order of llama GGUF files, in which RoPE rotates neighbours, not halves."""
    pairs: Tensor = tensor.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).reshape_as(tensor)
