"""In which basis a quantized model computes what its original does.

A checkpoint keeps no record of the rotations, scales and orders that were folded into its weights,
and ones made elsewhere have their own. The weights tell: rounding moves them by a tenth, an exact
transformation moves them altogether. Each is found from one side of where it acts and undone on the
other, so what is wrong on either side stays in sight.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qserve.models import names
from qserve.models.config import ModelConfig
from qserve.models.loader import read_weight
from qserve.models.source import WeightSource
from qserve.quant.hadamard import HadamardError, hadamard

_QUERY, _KEY, _VALUE = names.QKV
_GATE, _UP = names.GATE_UP
_OUTPUT, _DOWN = names.OUTPUT[0], names.DOWN[0]

_EQUAL = 1e-3
"""Squared difference over square below which embeddings are one, in 16 bits or fewer."""

_RELATED = 1.0
"""And below which two matrices are one, but for rounding: it is near 2 where they are unrelated."""

Weights = dict[str, Tensor]
"""float32 [N, K], by a linear's name within its layer; those after a norm hold the norm's weight."""


class BasisError(ValueError):
    """Two models cannot be compared; the message says why."""


def stream_rotation(original: Tensor, other: Tensor) -> Tensor | None:
    """float32 orthogonal R [H, H] with original @ R = other, from embeddings [V, H]; None for R = 1.

    Raises BasisError if there is no such R.
    """
    original, other = original.double(), other.double()
    if _difference(original, other) < _EQUAL:
        return None
    rotation = _rotation(original.T, other.T).T
    if _difference(original @ rotation, other) > _EQUAL:
        raise BasisError("the models' embeddings agree in no basis: one is not made from the other")
    return rotation.float()


def read_weights(source: WeightSource, index: int, device: torch.device) -> Weights:
    """The weights of a layer, dequantized, norms folded."""
    prefix = names.layer_prefix(index)
    weights = {}
    for part in names.linear_shapes(source.config):
        stored = read_weight(source, prefix + part)
        weight = stored if isinstance(stored, Tensor) else stored.dequantize()
        weights[part] = weight.to(device, torch.float32)
        if part in names.NORM_BEFORE:
            norm = source.tensor(prefix + names.NORM_BEFORE[part])
            weights[part] = weights[part] * norm.to(device, torch.float32)
    return weights


def in_basis_of(
    original: Weights, other: Weights, rotation: Tensor | None, config: ModelConfig
) -> Weights:
    """The original's weights in the basis in which `other` holds them.

    rotation: of the residual stream. Besides it, what the known methods fold: an order and scales of
    what down_proj reads, scales of queries against keys, a rotation and scales of each head's values.
    """
    weights = _in_stream(original, rotation)
    order = _row_order(weights[_GATE], other[_GATE])
    gate, up, down = weights[_GATE][order], weights[_UP][order], weights[_DOWN][:, order]
    channel = _row_scale(up, other[_UP])
    key = _row_scale(weights[_KEY], other[_KEY])
    group = config.num_heads // config.num_kv_heads
    query = key.unflatten(0, (config.num_kv_heads, -1)).repeat_interleave(group, dim=0).flatten()
    value, output = _in_heads(weights[_VALUE], weights[_OUTPUT], other[_VALUE], config)
    return {
        _QUERY: weights[_QUERY] / query[:, None],
        _KEY: weights[_KEY] * key[:, None],
        _VALUE: value,
        _OUTPUT: output,
        _GATE: gate,
        _UP: up * channel[:, None],
        _DOWN: down / channel,
    }


def _in_stream(weights: Weights, rotation: Tensor | None) -> Weights:
    if rotation is None:
        return weights
    return {
        part: weight @ rotation if part in names.NORM_BEFORE else rotation.T @ weight
        for part, weight in weights.items()
    }


def _in_heads(
    value: Tensor, output: Tensor, other_value: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """value and output, each head's values rotated and scaled as those of other_value are."""
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    heads, other_heads = (weight.unflatten(0, (kv_heads, -1)) for weight in (value, other_value))
    pairs = zip(heads.double(), other_heads.double(), strict=True)
    rotation = torch.stack([_rotation(*pair) for pair in pairs]).float()
    rotated = (rotation @ heads).flatten(0, 1)
    scale = _row_scale(rotated, other_value)
    undone = (rotation / scale.unflatten(0, (kv_heads, -1, 1))).repeat_interleave(group, dim=0)
    columns = output.unflatten(1, (config.num_heads, -1))
    return rotated * scale[:, None], torch.einsum("nhd,hcd->nhc", columns, undone).flatten(1)


def _rotation(original: Tensor, other: Tensor) -> Tensor:
    """The orthogonal R [H, H] for which R @ original is about `other`, [H, V] both, but for scales.

    None, or the one that our recipes fold; failing these, the closest (the orthogonal Procrustes
    problem, Schoenemann 1966), which takes up some of what rounding did.
    """
    known = [torch.eye(len(original), dtype=torch.float64)]
    with contextlib.suppress(HadamardError):
        known.append(hadamard(len(original)).T)
    for rotation in (matrix.to(original) for matrix in known):
        if _difference(normalize(rotation @ original), normalize(other)) < _RELATED:
            return rotation
    left, _, right = torch.linalg.svd(other @ original.T)
    closest: Tensor = left @ right
    return closest


def _row_order(original: Tensor, other: Tensor) -> Tensor:
    """i64 [N]: which row of the original each row of `other` [N, K] is."""
    original, other = (normalize(rows) for rows in (original, other))
    if _difference(original, other) < _RELATED:
        return torch.arange(len(other), device=other.device)
    order = torch.cat([(rows @ original.T).argmax(dim=1) for rows in other.split(1024)])
    if len(order.unique()) != len(order):
        raise BasisError(f"{_GATE}: the rows are not those of the original in any order")
    return order


def _row_scale(original: Tensor, other: Tensor) -> Tensor:
    """[N]: what each row of the original is multiplied by to come closest to `other` [N, K]."""
    scale = (original * other).sum(dim=1) / original.square().sum(dim=1)
    return torch.where(scale.isfinite() & (scale != 0), scale, torch.ones_like(scale))


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().sum() / second.square().sum())
