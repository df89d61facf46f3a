"""Every quantized linear of the real model, on a GPU: the bits of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from smollm2_helpers import smollm2
from torch import Tensor

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.weight import QuantizedWeight, W4Weight
from qserve.kernels import prepare_weight, quantized_linear
from qserve.kernels.gemm import reference_linear
from qserve.models.loader import read_weight
from qserve.models.names import GATE_UP, QKV, layer_prefix, linear_shapes
from qserve.models.source import WeightSource

pytestmark = pytest.mark.gpu

TOKENS = (1, 7, 64, 300)
FEW = 7
"""Tokens that the reference's int64 products are affordable for."""


def layer_weights(source: WeightSource, index: int) -> Iterator[tuple[str, QuantizedWeight]]:
    """Each linear by itself, then those that are served as one."""
    weights: dict[str, W4Weight] = {}
    for part in linear_shapes(source.config):
        weight = read_weight(source, layer_prefix(index) + part)
        assert isinstance(weight, W4Weight)
        weights[part] = weight
    yield from weights.items()
    for parts in (QKV, GATE_UP):
        yield "+".join(parts), W4Weight.concatenate([weights[part] for part in parts])


def lifelike_activation(tokens: int, columns: int) -> QuantizedActivation:
    """Channels of very different sizes, a few of them outliers."""
    sizes = torch.exp(torch.randn(columns))
    sizes[torch.randperm(columns)[:4]] *= 50
    return quantize_activation(torch.randn(tokens, columns) * sizes)


def on_gpu(x: QuantizedActivation) -> QuantizedActivation:
    return QuantizedActivation(*(tensor.cuda() for tensor in vars(x).values()))


def assert_the_same(weight: QuantizedWeight, dtype: torch.dtype, name: str) -> None:
    prepared, on_cpu = prepare_weight(weight, "cuda"), prepare_weight(weight, "cpu")
    for tokens in TOKENS:
        x = lifelike_activation(tokens, weight.shape[1])
        found: Tensor = quantized_linear(on_gpu(x), prepared, None, dtype).cpu()
        assert torch.equal(found, quantized_linear(x, on_cpu, None, dtype)), (name, tokens)
        if tokens <= FEW:
            assert torch.equal(found, reference_linear(x, weight, None, dtype)), (name, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_linear_of_every_layer(dtype: torch.dtype) -> None:
    source = smollm2()
    shapes = set()
    for index in range(source.config.num_layers):
        for part, weight in layer_weights(source, index):
            assert_the_same(weight, dtype, layer_prefix(index) + part)
            shapes.add(weight.shape)
    assert {(192, 576), (576, 1536), (960, 576), (3072, 576)} <= shapes
