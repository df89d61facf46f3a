"""What a model is. `ModelConfig.from_hf` is the only reader of Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

RopeKind = Literal["default", "linear", "dynamic", "llama3"]


class ModelError(ValueError):
    """A model, its files or one of its tensors cannot be used; the message names it."""


def first_line(error: BaseException) -> str:
    """What an error says first, for a message of one sentence that names the file itself."""
    said = (isinstance(error, OSError) and error.strerror) or str(error).strip()
    return (said or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and context-extension scaling.

    original_max_positions: positions before scaling (dynamic, llama3).
    low_freq_factor, high_freq_factor: the band that llama3 interpolates over.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        parameters = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in get_args(RopeKind):
            raise ModelError(f"rope scaling {kind!r} is not supported")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("partial_rotary_factor is not supported")
        theta = parameters.get("rope_theta", hf_config.get("rope_theta", 10000.0))
        scaling = {} if kind == "default" else _rope_scaling(kind, parameters, hf_config)
        return cls(float(theta), kind, **scaling)


def _rope_scaling(
    kind: str, parameters: Mapping[str, Any], hf_config: Mapping[str, Any]
) -> dict[str, Any]:
    scaling: dict[str, Any] = {"factor": float(_required(parameters, "factor", "rope scaling"))}
    trained = _required(hf_config, "max_position_embeddings", "config.json")
    if kind == "dynamic":
        scaling["original_max_positions"] = trained
    if kind == "llama3":
        original = parameters.get("original_max_position_embeddings", trained)
        scaling["original_max_positions"] = original
        for name in ("low_freq_factor", "high_freq_factor"):
            scaling[name] = float(_required(parameters, name, "rope scaling"))
    return scaling


@dataclass(frozen=True)
class _Family:
    """How an architecture differs from Llama."""

    qkv_bias: bool = False
    bias_attribute: bool = False
    qk_norm: bool = False
    windowed: bool = False


FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(bias_attribute=True),
    "MistralForCausalLM": _Family(windowed=True),
    "Qwen2ForCausalLM": _Family(qkv_bias=True),
    "Qwen3ForCausalLM": _Family(bias_attribute=True, qk_norm=True),
}
"""The architectures of the Llama family that are supported, by their Hugging Face names."""


@dataclass(frozen=True)
class ModelConfig:
    """One model of the Llama family.

    sliding_window: keys a token sees, itself included; None for all.
    qkv_bias, output_bias: whether those linears of attention carry a bias.
    qk_norm: RMSNorm over each head of q and k, before RoPE.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json; raise ModelError naming what is missing or unsupported."""
        architecture = _architecture(hf_config)
        family = FAMILIES[architecture]
        _refuse_unsupported(hf_config)
        sizes = {ours: _size(hf_config, theirs) for ours, theirs in _SIZES.items()}
        hidden, heads = sizes["hidden_size"], sizes["num_heads"]
        attention_bias = family.bias_attribute and bool(hf_config.get("attention_bias", False))
        config = cls(
            architecture=architecture,
            **sizes,
            num_kv_heads=_size(hf_config, "num_key_value_heads", heads),
            head_dim=_size(hf_config, "head_dim", hidden // heads),
            rms_norm_eps=float(hf_config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(hf_config),
            tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            output_bias=attention_bias,
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(hf_config, family.windowed, sizes["num_layers"]),
            bos_token_id=hf_config.get("bos_token_id"),
            eos_token_ids=token_ids(hf_config.get("eos_token_id")),
            dtype=_dtype(hf_config),
        )
        return config._validated()

    def _validated(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd")
        return self

    @property
    def max_positions(self) -> int:
        """Positions it can be served at: linear and dynamic scaling extend those config.json names."""
        extends = self.rope.kind in ("linear", "dynamic")
        return int(self.max_position_embeddings * (self.rope.factor if extends else 1))

    @property
    def query_size(self) -> int:
        """Columns of q in qkv."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of k, and of v, in qkv."""
        return self.num_kv_heads * self.head_dim


_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}

_REQUIRED_VALUES = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0}


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An `eos_token_id` as config.json spells it, one id, several or none, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _architecture(hf_config: Mapping[str, Any]) -> str:
    names = hf_config.get("architectures") or ["none named"]
    if names[0] not in FAMILIES:
        raise ModelError(f"architecture {names[0]} is not supported; {', '.join(FAMILIES)} are")
    return str(names[0])


def _refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    for name, supported in _REQUIRED_VALUES.items():
        if hf_config.get(name, supported) != supported:
            raise ModelError(f"{name} = {hf_config[name]!r} is not supported, only {supported!r}")


def _required(values: Mapping[str, Any], name: str, owner: str) -> Any:
    if values.get(name) is None:
        raise ModelError(f"{owner} lacks {name}")
    return values[name]


def _size(hf_config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = hf_config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json: {name} = {value!r} is not a positive integer")
    return value


def _sliding_window(hf_config: Mapping[str, Any], windowed: bool, num_layers: int) -> int | None:
    if not hf_config.get("use_sliding_window", windowed):
        return None
    window = hf_config.get("sliding_window", 4096)
    layers = _windowed_layers(hf_config, windowed, num_layers)
    if window is None or not any(layers):
        return None
    if not all(layers):
        raise ModelError("a sliding window on some layers only is not supported")
    return int(window)


def _windowed_layers(hf_config: Mapping[str, Any], windowed: bool, num_layers: int) -> list[bool]:
    kinds = hf_config.get("layer_types")
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    first = hf_config.get("max_window_layers", 0 if windowed else 28)  # Qwen's default
    return [layer >= first for layer in range(num_layers)]


def _dtype(hf_config: Mapping[str, Any]) -> torch.dtype:
    name = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float16"
    supported = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in supported:
        raise ModelError(f"dtype {name!r} is not supported; {', '.join(supported)} are")
    return supported[name]
