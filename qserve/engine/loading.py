"""From the source of a model to what serves it: decoder, tokenizer and what the cache is to hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from qserve.config import ConfigError, EngineConfig
from qserve.engine.kv_cache import free_bytes
from qserve.formats.checkpoint import QuantizationConfig
from qserve.models.decoder import Decoder
from qserve.models.loader import Activations, load_decoder
from qserve.models.source import WeightSource

UNQUANTIZED = QuantizationConfig(activation_bits=16, kv_bits=16)
"""How a model is served whose config.json does not say."""


@dataclass(frozen=True)
class LoadedModel:
    """quantization: what config.json says, where the settings do not say otherwise."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    quantization: QuantizationConfig


def load_model(source: WeightSource, config: EngineConfig) -> LoadedModel:
    """Load a source as `config` says.

    Raises ModelError if it cannot be read, ConfigError if it does not go with `config`.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, source.config.dtype, device)
    quantization = quantization_of(source, config)
    activations: Activations = "int8" if quantization.activation_bits == 8 else "float"
    try:
        decoder = load_decoder(source, dtype, device, activations)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the model's weights do not fit {device}: of its memory, "
            f"{free_bytes(device) >> 20} MiB are left after a part of them"
        ) from error
    return LoadedModel(decoder, source.tokenizer(), quantization)


def quantization_of(source: WeightSource, config: EngineConfig) -> QuantizationConfig:
    """What the source says of itself, overridden by the bits that `config` names."""
    stored = UNQUANTIZED
    if source.quantization is not None:
        stored = QuantizationConfig.from_json(source.quantization)
    elif config.activation_bits == 8:
        raise ConfigError("activation_bits 8 needs quantized weights, and the model has none")
    return replace(
        stored,
        activation_bits=config.activation_bits or stored.activation_bits,
        kv_bits=config.kv_bits or stored.kv_bits,
    )


def resolve_device(device: str) -> torch.device:
    """The device of this name; "auto" is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: PyTorch finds no GPU")
    if resolved.index:  # streams and graphs are those of a thread's current device, the first
        raise ConfigError(f"device {device!r}: name a GPU by CUDA_VISIBLE_DEVICES, not by number")
    return resolved


def resolve_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is float32 on a CPU, else the stored one, at most 16 bits."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if stored == torch.float32 else stored
