"""A GEMM that goes on with a norm gives the bits of the two launches it stands for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.grid import fit_grid
from qserve.kernels import gemm_norm_cuda, quantized_linear, rms_norm_quantize
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_norm import linear_rms_norm_quantize
from qserve.kernels.tiles import Tile, tiles_for
from qserve.models.decoder import DecoderLayer
from qserve.models.layers import Addend, QuantizedLinear, RMSNorm
from qserve.testing.launches import count_launches

pytestmark = pytest.mark.gpu

SMALL_TILES = [tile for tile in tiles_for("sm_90a") if tile.kind == "small"]
EPS = 1e-5


def prepare(rows: int, columns: int, group_size: int) -> CudaWeight:
    grid = fit_grid(torch.randn(rows, columns, device="cuda"), group_size)
    weight = grid.pack(grid.quantize(torch.randn(rows, columns, device="cuda")))
    return CudaWeight.prepare(weight, torch.device("cuda"))


def make_activation(tokens: int, columns: int) -> QuantizedActivation:
    return quantize_activation(torch.randn(tokens, columns, device="cuda"))


def assert_same(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every output starts as what no kernel writes, so that one that is never written shows."""
    allocate = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else -128)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.mark.parametrize("tile", SMALL_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_small_tile(tile: Tile, dtype: torch.dtype) -> None:
    for rows, columns in ((576, 1536), (4096, 512)):
        weight = prepare(rows, columns, 128)
        gain = (torch.rand(rows, device="cuda") + 0.5).to(dtype)
        for tokens in (1, 5, tile.tokens, 2 * tile.tokens + 37):
            x = make_activation(tokens, columns)
            residual = torch.randn(tokens, rows, device="cuda").to(dtype)
            product = weight.apply_tile(x, None, dtype, tile)
            expected, expected_total = rms_norm_quantize(product, gain, EPS, residual)
            for _ in range(2):  # the inbox is empty again
                out, total = gemm_norm_cuda.linear_rms_norm_quantize(
                    x, weight, None, dtype, gain, EPS, residual, tile
                )
                assert torch.equal(total, expected_total), (rows, tokens)
                assert_same(out, expected)
                assert bool((weight.inbox == -1).all())


def chain(
    x: QuantizedActivation, weight: CudaWeight, gain: Tensor, residual: Tensor, fused: bool
) -> tuple[QuantizedActivation, Tensor]:
    for _ in range(40):
        if fused:
            x, residual = gemm_norm_cuda.linear_rms_norm_quantize(
                x, weight, None, torch.float16, gain, EPS, residual
            )
        else:
            product = quantized_linear(x, weight, None, torch.float16)
            x, residual = rms_norm_quantize(product, gain, EPS, residual)
    return x, residual


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_launches_in_a_row_and_graph_replays(tokens: int) -> None:
    """Each launch starts while the one before still runs, with the same inbox."""
    weight, gain = prepare(1024, 1024, 128), torch.rand(1024, device="cuda") / 64
    x, residual = make_activation(tokens, 1024), torch.randn(tokens, 1024, device="cuda").half()
    chain(x, weight, gain, residual, fused=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(x, weight, gain, residual, fused=True)
    for _ in range(3):
        fresh = make_activation(tokens, 1024)
        for captured, new in zip(vars(x).values(), vars(fresh).values(), strict=True):
            captured.copy_(new)
        graph.replay()
        expected = chain(x, weight, gain, residual, fused=False)
        assert torch.equal(found[1], expected[1])
        assert_same(found[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_that_are_no_numbers_are_outputs(dtype: torch.dtype) -> None:
    """No result is what the inbox holds where there is none, else this would never end."""
    weight, gain = prepare(2048, 1024, 128), torch.ones(2048, device="cuda").to(dtype)
    x, residual = make_activation(4, 1024), torch.zeros(4, 2048, device="cuda").to(dtype)
    x.scale[:] = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
    product = quantized_linear(x, weight, None, dtype)
    assert product.isnan()[:2].all() and product.isinf()[2:].any()
    assert (product.view(torch.int16) != -1).all()
    _, total = gemm_norm_cuda.linear_rms_norm_quantize(x, weight, None, dtype, gain, EPS, residual)
    torch.testing.assert_close(total, product + residual, rtol=0, atol=0, equal_nan=True)


def test_one_launch_or_two() -> None:
    weight = prepare(4096, 1024, -1)
    gain = torch.ones(4096, device="cuda").half()
    for tokens, launches in ((1, 1), (33, 1), (128, 1), (2048, 2)):
        x, residual = make_activation(tokens, 1024), torch.zeros(tokens, 4096).cuda().half()
        with count_launches() as launched:
            linear_rms_norm_quantize(x, weight, None, torch.float16, gain, EPS, residual)
        assert len(launched) == launches


class FixedAttention:
    """Attention's output, made beforehand."""

    def __init__(self, tokens: int, columns: int) -> None:
        self.output = make_activation(tokens, columns)

    def __call__(self, layer_index: int, qkv: Tensor) -> Tensor:
        raise AssertionError("a quantized linear asks for codes")

    def quantized(self, layer_index: int, qkv: Tensor) -> QuantizedActivation:
        return self.output


def make_layer(hidden: int, intermediate: int) -> DecoderLayer:
    def linear(rows: int, columns: int) -> QuantizedLinear:
        return QuantizedLinear(prepare(rows, columns, 128), None, torch.float16)

    norm = RMSNorm(torch.ones(hidden, device="cuda").half(), EPS)
    return DecoderLayer(
        attention_norm=norm,
        qkv=linear(3 * hidden, hidden),
        head_norm=None,
        output=linear(hidden, hidden),
        mlp_norm=norm,
        gate_up=linear(2 * intermediate, hidden),
        down=linear(hidden, intermediate),
    )


@pytest.mark.parametrize(("tokens", "per_layer"), [(1, 5), (64, 5), (2048, 7)])
def test_launches_of_a_decoder_layer(tokens: int, per_layer: int) -> None:
    """Attention aside; the first norm has no GEMM before it, the last GEMM no quantized norm after."""
    layers = [make_layer(2048, 1536) for _ in range(3)]
    attend = FixedAttention(tokens, 2048)
    x: Addend = torch.randn(tokens, 2048, device="cuda").half()
    residual = None
    with count_launches() as launched:
        for index, layer in enumerate(layers):
            x, residual = layer(x, residual, attend, index)
        layers[0].attention_norm(x, residual)
    fused = 7 - per_layer
    assert len(launched) == 3 * per_layer + 1 + fused // 2
