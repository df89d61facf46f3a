"""Tiny random models of every family, as sources, as directories and as Hugging Face's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qserve.formats.grid import fit_grid
from qserve.formats.weight import QuantizedWeight, W8Weight
from qserve.models.config import ModelConfig, ModelError
from qserve.models.names import linear_shapes, tensor_shapes
from qserve.models.source import WeightSource

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""The scaling of Llama 3.1, for a model trained on 64 positions."""

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """config.json of a model small enough for tests, its sizes fit for 4-bit weights."""
    return {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": 320,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 192,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
        **changes,
    }


def tiny_tensors(hf_config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors of such a model, scaled so that every part of it matters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.2 * noise
        return noise * (0.2 if len(shape) == 1 else shape[1] ** -0.5)

    shapes = tensor_shapes(ModelConfig.from_hf(hf_config))
    return {name: draw(name, shape) for name, shape in shapes.items()}


@dataclass
class MemorySource(WeightSource):
    """A `WeightSource` whose tensors are given."""

    hf_config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def names(self) -> set[str]:
        return set(self.tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ModelError(f"there is no tensor {name}")
        return self.tensors[name]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tiny_tokenizer()

    def save_tokenizer(self, directory: Path) -> None:
        tiny_tokenizer().save_pretrained(directory)


def tiny_source(hf_config: dict[str, Any] | None = None, seed: int = 0) -> MemorySource:
    """A tiny random model in memory."""
    hf_config = hf_config or tiny_config()
    return MemorySource(hf_config, tiny_tensors(hf_config, seed))


def assert_same_tensors(source: WeightSource, expected: dict[str, Tensor]) -> None:
    """The source has these tensors and no others."""
    assert source.names() == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.tensor(name), tensor), name


def quantized_source(
    source: MemorySource, bits_of: Callable[[str], int | None], group_size: int = 64
) -> MemorySource:
    """The source with each linear rounded to 4 or 8 bits, or left as it is, as `bits_of(name)`
    says."""
    tensors = dict(source.tensors)
    parts = tuple(f".{part}.weight" for part in linear_shapes(source.config))
    for name in filter(lambda name: name.endswith(parts), source.tensors):
        linear = name.removesuffix(".weight")
        bits = bits_of(linear)
        if bits is not None:
            packed = _round(tensors.pop(name), bits, group_size).tensors()
            tensors |= {f"{linear}.{suffix}": tensor for suffix, tensor in packed.items()}
    return MemorySource(source.hf_config, tensors)


def _round(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    if bits == 8:
        return W8Weight.quantize(weight)
    grid = fit_grid(weight, group_size)
    return grid.pack(grid.quantize(weight))


def save_tiny_model(
    directory: Path, hf_config: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """Write a tiny random model, tokenizer included, as a Hugging Face directory."""
    source = tiny_source(hf_config, seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(source.hf_config))
    save_file(source.tensors, directory / "model.safetensors")
    source.save_tokenizer(directory)
    return directory


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after three special ones; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in _SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL_TOKENS[0],
        eos_token=_SPECIAL_TOKENS[2],
        chat_template=_CHAT_TEMPLATE,
    )


def tiny_hf_model(source: MemorySource) -> PreTrainedModel:
    """Hugging Face's implementation with the same weights, float32: the oracle of the decoder."""
    values = dict(source.hf_config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    absent = model.load_state_dict(source.tensors, strict=False).missing_keys
    assert set(absent) <= {"lm_head.weight"} and (not absent or config.tie_word_embeddings)
    model.tie_weights()
    return model.float().eval()
