"""A GGUF file as a source: its metadata as config.json, its tensors by their Hugging Face names."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from qserve.models import names
from qserve.models.config import ModelConfig, ModelError, RopeConfig
from qserve.models.rope import llama3_multipliers, unscaled_frequencies
from qserve.models.tokenizer import load_tokenizer

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
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


class GGUFSource:
    """A `.gguf` file of the Llama family; tensors are dequantized to float32, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ModelError(f"{path}: not a whole GGUF file: {error}") from error
        self._metadata = {name: field.contents() for name, field in reader.fields.items()}
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self.hf_config = self._read_config()

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf_config)

    @property
    def quantization(self) -> dict[str, Any] | None:
        return None

    def names(self) -> set[str]:
        return set(self._stored_names)

    def tensor(self, name: str) -> Tensor:
        if name not in self._stored_names:
            raise ModelError(f"{self.path}: there is no tensor {name}")
        tensor = self._dequantize(self._stored_names[name])
        permuted = "self_attn.q_proj" in name or "self_attn.k_proj" in name
        if permuted and self._metadata["general.architecture"] == "llama":
            return _halves_from_pairs(tensor, self.config.head_dim)
        return tensor

    def save_tokenizer(self, directory: Path) -> None:
        load_tokenizer(self.path).save_pretrained(directory)

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
        return torch.from_numpy(values.copy())

    def _read_config(self) -> dict[str, Any]:
        architecture = self._required("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise ModelError(f"{self.path}: architecture {architecture!r} is not supported")
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        config = {
            "architectures": [_ARCHITECTURES[architecture]],
            "model_type": architecture,
            "hidden_size": hidden,
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": self._size("attention.key_length", hidden // heads),
            "intermediate_size": self._size("feed_forward_length"),
            "max_position_embeddings": self._size("context_length"),
            "vocab_size": len(self._required("tokenizer.ggml.tokens")),
            "rms_norm_eps": self._size("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self._stored,
            "attention_bias": "blk.0.attn_output.bias" in self._stored,
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._metadata.get("tokenizer.ggml.eos_token_id"),
            "dtype": "float16",
        }
        return {**config, **self._rope(config["head_dim"])}

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = self._size("rope.freq_base", 10000.0)
        scaling = self._size("rope.scaling.type", "none")
        if _ROPE_FACTORS in self._stored:
            return {"rope_theta": theta, "rope_scaling": self._llama3_scaling(theta, head_dim)}
        if scaling == "none":
            return {"rope_theta": theta}
        factor = self._size("rope.scaling.factor")
        return {"rope_theta": theta, "rope_scaling": {"rope_type": scaling, "factor": factor}}

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The file holds divisors of the frequencies; Llama 3's own constants must give them."""
        divisors = self._dequantize(_ROPE_FACTORS).double()
        scaling = {**_LLAMA3_ROPE, "factor": float(divisors.max())}
        rope = RopeConfig.from_hf({"rope_theta": theta, "rope_scaling": scaling})
        expected = 1 / llama3_multipliers(rope, unscaled_frequencies(theta, head_dim))
        if not torch.allclose(divisors, expected, rtol=1e-3):
            raise ModelError(f"{self.path}: {_ROPE_FACTORS} is not the scaling of Llama 3")
        return scaling

    def _required(self, key: str) -> Any:
        if key not in self._metadata:
            raise ModelError(f"{self.path}: metadata lacks {key}")
        return self._metadata[key]

    def _size(self, key: str, default: Any = None) -> Any:
        """Metadata of the architecture; required where there is no default."""
        full_key = f"{self._metadata['general.architecture']}.{key}"
        if default is None:
            return self._required(full_key)
        return self._metadata.get(full_key, default)


def _hf_name(stored: str) -> str:
    if stored in _OUTER_NAMES:
        return _OUTER_NAMES[stored]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if match is None or match[2] not in _LAYER_NAMES:
        return stored
    return f"{names.layer_prefix(int(match[1]))}{_LAYER_NAMES[match[2]]}.{match[3]}"


def _halves_from_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Undo the row order of llama GGUF files, in which RoPE rotates neighbours, not halves."""
    heads = tensor.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).reshape(tensor.shape)
