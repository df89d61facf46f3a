"""Calibration: text to tokens, and a decoder layer that pauses at each of its linears."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor
from torch.nn import functional

from qserve.models import names
from qserve.models.config import ModelConfig
from qserve.models.source import WeightSource

Layer = dict[str, Tensor]
"""A layer's tensors by their names within it, float32: norms, weights [N, K], biases [N]."""

Parts = tuple[str, ...]
"""Linears of a layer that share an input: `names.QKV`, `OUTPUT`, `GATE_UP` or `DOWN`."""

Steps = Generator[tuple[Parts, Tensor], Tensor, Tensor]


def read_layer(source: WeightSource, index: int, device: torch.device | str = "cpu") -> Layer:
    """All tensors of one layer."""
    prefix = names.layer_prefix(index)
    return {
        name: source.tensor(prefix + name).to(device, torch.float32)
        for name in names.layer_shapes(source.config)
    }


def layer_steps(
    layer: Layer, config: ModelConfig, x: Tensor, attend: Callable[[Tensor], Tensor]
) -> Steps:
    """One layer on x [T, H]: yields each linear and its input, is sent the output, returns [T, H]."""
    eps = config.rms_norm_eps

    def norm(values: Tensor, name: str) -> Tensor:
        return functional.rms_norm(values, values.shape[-1:], layer[name], eps)

    def head_norm(qkv: Tensor) -> Tensor:
        if not config.qk_norm:
            return qkv
        sizes = [config.query_size, config.kv_size, config.kv_size]
        query, key, value = (
            part.unflatten(-1, (-1, config.head_dim)) for part in qkv.split(sizes, -1)
        )
        query, key = norm(query, names.QUERY_NORM), norm(key, names.KEY_NORM)
        return torch.cat((query, key, value), dim=-2).flatten(-2)

    qkv = yield names.QKV, norm(x, names.ATTENTION_NORM)
    x = x + (yield names.OUTPUT, attend(head_norm(qkv)))
    gate_up = yield names.GATE_UP, norm(x, names.MLP_NORM)
    gate, up = gate_up.chunk(2, dim=-1)
    return x + (yield names.DOWN, functional.silu(gate) * up)
