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
    """Largest magnitudes over a sample of calibration tokens.

    inputs: [K] of each fused linear's input, by its parts. query [Hq, D], key [Hkv, D]: after RoPE.
    """

    inputs: dict[tuple[str, ...], Tensor]
    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class SmoothAttention:
    """Divide key channels by max|k|^key_strength / max|q|^query_strength, multiply queries by it.

    Both channels that RoPE turns into each other share a factor, and so do a key head's queries.
    Where a norm after the projections would undo it (Qwen3), the layer stays as it is.
    """

    key_strength: float = 0.5
    query_strength: float = 0.0

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        if config.qk_norm:
            return layer
        query_heads = statistics.query.unflatten(0, (config.num_kv_heads, -1))
        query, key = _pair_maximum(query_heads.amax(dim=1)), _pair_maximum(statistics.key)
        factor = _factor(key, self.key_strength, query, self.query_strength)
        scaled = _scale_rows(layer, names.QKV[0], _over_query_heads(factor, config))
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
    """Divide what o_proj and down_proj read by max|x|^alpha / max|w|^beta, within v_proj and up_proj.

    A value channel is read by all query heads of its key head, which share its factor.
    """

    alpha: float
    beta: float

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        read, weights = statistics.inputs, self._weight_maxima(layer)
        factor = self._factor(read[names.DOWN], weights[names.DOWN])
        layer = _scale_rows(layer, names.GATE_UP[1], 1 / factor)
        layer = _scale_columns(layer, names.DOWN[0], factor)
        spans = (_by_key_head(each[names.OUTPUT], config).amax(dim=1) for each in (read, weights))
        shared = self._factor(*spans)
        layer = _scale_rows(layer, names.QKV[2], 1 / shared.flatten())
        return _scale_columns(layer, names.OUTPUT[0], _over_query_heads(shared, config))

    def _factor(self, span: Tensor, weight: Tensor) -> Tensor:
        return _factor(span, self.alpha, weight, self.beta)

    def _weight_maxima(self, layer: Layer) -> dict[tuple[str, ...], Tensor]:
        """[K]: the largest magnitude of each column."""
        linears = (names.OUTPUT, names.DOWN)
        return {parts: layer[f"{parts[0]}.weight"].abs().amax(dim=0) for parts in linears}


@dataclass(frozen=True)
class ReorderChannels:
    """Sort what o_proj and down_proj read by loudness, so that groups hold channels that are alike.

    Value channels keep to their head, and have one order for all query heads that read it.
    """

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        order = torch.argsort(statistics.inputs[names.DOWN], stable=True)
        for part in names.GATE_UP:
            layer = _take_rows(layer, part, order)
        layer = _take_columns(layer, names.DOWN[0], order)
        loudness = _by_key_head(statistics.inputs[names.OUTPUT], config).amax(dim=1)
        in_head = torch.argsort(loudness, dim=1, stable=True)
        first = torch.arange(config.num_kv_heads, device=order.device)[:, None] * config.head_dim
        layer = _take_rows(layer, names.QKV[2], (in_head + first).flatten())
        first = torch.arange(config.num_heads, device=order.device)[:, None] * config.head_dim
        queries = _over_query_heads(in_head, config).unflatten(0, (config.num_heads, -1))
        return _take_columns(layer, names.OUTPUT[0], (queries + first).flatten())


@dataclass(frozen=True)
class RotateValues:
    """Multiply the values of each head by a Hadamard matrix, undone in the output projection."""

    def __call__(self, layer: Layer, statistics: Statistics, config: ModelConfig) -> Layer:
        return rotate.rotate_values(layer, config)


LayerPass = Callable[[Layer, Statistics, ModelConfig], Layer]


@dataclass(frozen=True)
class OneOf:
    """Passes of which each layer takes the one that leaves it the lowest error."""

    passes: tuple[LayerPass, ...]


_STRENGTHS = tuple(step / 10 for step in range(1, 10))

SEARCHED_ATTENTION = OneOf(
    (
        SmoothAttention(0.0),
        *(SmoothAttention(strength) for strength in _STRENGTHS),
        *(SmoothAttention(strength, 1 - strength) for strength in _STRENGTHS),
    )
)
SEARCHED_OUTPUTS = OneOf(tuple(SmoothOutputs(strength, 1 - strength) for strength in _STRENGTHS))
SEARCHED_INPUTS = OneOf(tuple(SmoothInputs(strength, 1 - strength) for strength in _STRENGTHS))


def _factor(first: Tensor, first_strength: float, second: Tensor, second_strength: float) -> Tensor:
    """first^strength / second^strength, 1 where either vanishes."""
    factor = first**first_strength / second**second_strength
    return torch.where((first > 0) & (second > 0), factor, torch.ones_like(factor))


def _pair_maximum(heads: Tensor) -> Tensor:
    """[H, D]: for both of the channels i and i + D/2 the larger value."""
    first, second = heads.chunk(2, dim=-1)
    return torch.maximum(first, second).repeat(1, 2)


def _by_key_head(values: Tensor, config: ModelConfig) -> Tensor:
    """[Hkv, Hq / Hkv, D] of what each input of o_proj has, [Hq D]."""
    return values.reshape(config.num_kv_heads, -1, config.head_dim)


def _over_query_heads(values: Tensor, config: ModelConfig) -> Tensor:
    """[Hq D] of what each channel of the key heads has, [Hkv, D]."""
    return values.repeat_interleave(config.num_heads // config.num_kv_heads, dim=0).flatten()


def _scale_rows(layer: Layer, linear: str, factor: Tensor) -> Layer:
    scaled = {f"{linear}.weight": layer[f"{linear}.weight"] * factor[:, None]}
    if f"{linear}.bias" in layer:
        scaled[f"{linear}.bias"] = layer[f"{linear}.bias"] * factor
    return {**layer, **scaled}


def _scale_columns(layer: Layer, linear: str, factor: Tensor) -> Layer:
    return {**layer, f"{linear}.weight": layer[f"{linear}.weight"] * factor}


def _take_rows(layer: Layer, linear: str, order: Tensor) -> Layer:
    present = [f"{linear}.{kind}" for kind in ("weight", "bias") if f"{linear}.{kind}" in layer]
    return {**layer, **{name: layer[name][order] for name in present}}


def _take_columns(layer: Layer, linear: str, order: Tensor) -> Layer:
    return {**layer, f"{linear}.weight": layer[f"{linear}.weight"][:, order]}
