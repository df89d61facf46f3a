"""A GEMM with a tail gives the bits of the two launches it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.weight import fit_grid
from qserve.kernels import quantized_linear, rms_norm_quantize, silu_mul_quantize
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_tail import linear_rms_norm_quantize, linear_silu_mul_quantize
from qserve.kernels.gemm_tail_cuda import MOST_TOKENS, fuses
from qserve.kernels.gemm_variants import Tail
from qserve.kernels.tiles import Tile, tiles_for
from qserve.testing.launches import count_launches

pytestmark = pytest.mark.gpu

SMALL_TILES = [tile for tile in tiles_for("sm_90a") if tile.kind == "small"]
EPS = 1e-5


def prepare(rows: int, columns: int, group_size: int = -1) -> CudaWeight:
    grid = fit_grid(torch.randn(rows, columns, device="cuda"), group_size)
    weight = grid.pack(grid.quantize(torch.randn(rows, columns, device="cuda")))
    return CudaWeight.prepare(weight, torch.device("cuda"))


def make_activation(tokens: int, columns: int) -> QuantizedActivation:
    return quantize_activation(torch.randn(tokens, columns, device="cuda"))


def poisoned(tokens: int, columns: int) -> QuantizedActivation:
    out = QuantizedActivation.empty(tokens, columns, torch.device("cuda"))
    out.codes.fill_(-128), out.scale.fill_(math.nan), out.row_sum.fill_(1 << 30)
    return out


def assert_same(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name


@pytest.mark.parametrize("tile", SMALL_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_small_tile_with_a_norm(tile: Tile, dtype: torch.dtype) -> None:
    for rows, columns in ((576, 1536), (4096, 512)):
        weight = prepare(rows, columns, 128)
        gain = (torch.rand(rows, device="cuda") + 0.5).to(dtype)
        tail = Tail("rms_norm_quantize", rows)
        for tokens in (1, 5, tile.tokens, 2 * tile.tokens + 37):
            x = make_activation(tokens, columns)
            residual = torch.randn(tokens, rows, device="cuda").to(dtype)
            product = weight.apply_tile(x, None, dtype, tile)
            expected, expected_total = rms_norm_quantize(product, gain, EPS, residual)
            for _ in range(2):  # the counters are ready again
                out, total = poisoned(tokens, rows), torch.full_like(residual, math.nan)
                fields = (residual, gain, total, EPS, out.codes, out.scale, out.row_sum)
                weight.apply_tile(x, None, dtype, tile, tail, fields)
                assert torch.equal(total, expected_total), (rows, tokens)
                assert_same(out, expected)


@pytest.mark.parametrize("tile", SMALL_TILES, ids=str)
def test_every_small_tile_with_the_gated_activation(tile: Tile) -> None:
    for rows, columns in ((3072, 576), (28672, 256)):
        weight = prepare(rows, columns)
        tail = Tail("silu_mul_quantize", rows // 2)
        for tokens in (1, 2 * tile.tokens + 37):
            x = make_activation(tokens, columns)
            expected = silu_mul_quantize(weight.apply_tile(x, None, torch.bfloat16, tile))
            out = poisoned(tokens, rows // 2)
            fields = (out.codes, out.scale, out.row_sum)
            weight.apply_tile(x, None, torch.bfloat16, tile, tail, fields)
            assert_same(out, expected)


def chain(
    x: QuantizedActivation, up: CudaWeight, down: CudaWeight, gain: Tensor, residual: Tensor
) -> tuple[QuantizedActivation, Tensor]:
    for _ in range(20):
        gated = linear_silu_mul_quantize(x, up, None, torch.float16)
        x, residual = linear_rms_norm_quantize(
            gated, down, None, torch.float16, gain, EPS, residual
        )
    return x, residual


def chain_of_pairs(
    x: QuantizedActivation, up: CudaWeight, down: CudaWeight, gain: Tensor, residual: Tensor
) -> tuple[QuantizedActivation, Tensor]:
    for _ in range(20):
        gated = silu_mul_quantize(quantized_linear(x, up, None, torch.float16))
        product = quantized_linear(gated, down, None, torch.float16)
        x, residual = rms_norm_quantize(product, gain, EPS, residual)
    return x, residual


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_launches_in_a_row_and_graph_replays(tokens: int) -> None:
    """Each launch starts while the one before still runs, on the same counters."""
    up, down = prepare(6144, 1024, 128), prepare(1024, 3072, 128)
    gain = torch.rand(1024, device="cuda") / 64
    x, residual = make_activation(tokens, 1024), torch.randn(tokens, 1024, device="cuda").half()
    assert fuses(Tail("rms_norm_quantize", 1024, True), down, tokens)
    chain(x, up, down, gain, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(x, up, down, gain, residual)
    for _ in range(3):
        fresh = make_activation(tokens, 1024)
        for captured, new in zip(vars(x).values(), vars(fresh).values(), strict=True):
            captured.copy_(new)
        graph.replay()
        expected = chain_of_pairs(x, up, down, gain, residual)
        assert torch.equal(found[1], expected[1])
        assert_same(found[0], expected[0])


def test_one_launch_or_two() -> None:
    weight = prepare(1024, 1024)
    gain = torch.ones(1024, device="cuda").half()
    for tokens, launches in ((1, 1), (MOST_TOKENS, 1), (2048, 2)):
        x, residual = make_activation(tokens, 1024), torch.zeros(tokens, 1024).cuda().half()
        with count_launches() as launched:
            linear_rms_norm_quantize(x, weight, None, torch.float16, gain, EPS, residual)
        assert len(launched) == launches
