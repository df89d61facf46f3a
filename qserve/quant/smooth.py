"""Passes that move a layer's difficult channels about and leave what it computes as it was.

Sources: QoQ (arXiv 2405.04532), sections 4.2 and 4.3, SmoothQuant (arXiv 2211.10438),
AWQ (arXiv 2306.00978); biases are scaled with their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.models import names
from qserve.models.config import ModelConfig
from qserve.quant import rotate
from qserve.quant.calibrate import Layer


@dataclass(frozen=True)
class Statistics:
    """Largest magnitudes over calibration tokens.

    inputs: [K] of each fused linear's input, by its parts. query [Hq, D], key [Hkv, D]: after RoPE.
    """

    inputs: dict[tuple[str, ...], Tensor]
    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class SmoothAttention:
    """Divide key channels by max|k|^key_strength / max|q|^query_strength, multiply queries by it.

    Both channels that RoPE turns into each other share a factor, and so do a key head's queries.
    """

    key_strength: float = 0.5
    query_strength: float = 0.0

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        if config.qk_norm:
            return layer
        query_heads = statistics.query.unflatten(0, (config.num_kv_heads, -1))
        query, key = _pair_maximum(query_heads.amax(dim=1)), _pair_maximum(statistics.key)
        factor = _factor(key, self.key_strength, query, self.query_strength)
        repeated = factor.repeat_interleave(config.num_heads // config.num_kv_heads, dim=0)
        scaled = _scale_rows(layer, names.QKV[0], repeated.flatten())
        return _scale_rows(scaled, names.QKV[1], 1 / factor.flatten())


@dataclass(frozen=True)
class SmoothInputs:
    """Divide what qkv and gate_up read by max|x|^alpha / max|w|^beta, within the norm before them."""

    alpha: float
    beta: float

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        result = dict(layer)
        for norm, parts in ((names.ATTENTION_NORM, names.QKV), (names.MLP_NORM, names.GATE_UP)):
            weights = torch.stack([layer[f"{part}.weight"].abs().amax(dim=0) for part in parts])
            span = statistics.inputs[parts]
            factor = _factor(span, self.alpha, weights.amax(dim=0), self.beta)
            result[norm] = layer[norm] / factor
            result |= {f"{part}.weight": layer[f"{part}.weight"] * factor for part in parts}
        return result


@dataclass(frozen=True)
class SmoothOutputs:
    """Divide what down_proj reads by max|x|^alpha / max|w|^beta, within up_proj."""

    alpha: float
    beta: float

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        up, down = names.GATE_UP[1], names.DOWN[0]
        weight = layer[f"{down}.weight"]
        span = statistics.inputs[names.DOWN]
        factor = _factor(span, self.alpha, weight.abs().amax(dim=0), self.beta)
        return {**_scale_rows(layer, up, 1 / factor), f"{down}.weight": weight * factor}


@dataclass(frozen=True)
class ReorderChannels:
    """Sort what down_proj reads by its loudness, so that groups hold channels that are alike."""

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        order = torch.argsort(statistics.inputs[names.DOWN], stable=True)
        down = f"{names.DOWN[0]}.weight"
        rows = {f"{part}.weight": layer[f"{part}.weight"][order] for part in names.GATE_UP}
        return {**layer, **rows, down: layer[down][:, order]}


@dataclass(frozen=True)
class RotateValues:
    """Multiply the values of each head by a Hadamard matrix, undone in the output projection."""

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        return rotate.rotate_values(layer, config)


LayerPass = Callable[[Layer, Statistics, ModelConfig], Layer]


def _factor(first: Tensor, first_strength: float, second: Tensor, second_strength: float) -> Tensor:
    """first^strength / second^strength, 1 where either vanishes."""
    factor = first**first_strength / second**second_strength
    return torch.where((first > 0) & (second > 0), factor, torch.ones_like(factor))


def _pair_maximum(heads: Tensor) -> Tensor:
    """[H, D]: for both of the channels i and i + D/2 the larger value."""
    first, second = heads.chunk(2, dim=-1)
    return torch.maximum(first, second).repeat(1, 2)


def _scale_rows(layer: Layer, linear: str, factor: Tensor) -> Layer:
    scaled = {f"{linear}.weight": layer[f"{linear}.weight"] * factor[:, None]}
    if f"{linear}.bias" in layer:
        scaled[f"{linear}.bias"] = layer[f"{linear}.bias"] * factor
    return {**layer, **scaled}
