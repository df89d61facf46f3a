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
LARGE_TILES = [tile for tile in tiles_for("sm_90a") if tile.kind == "large"]
EPS = 1e-5
DTYPE = torch.bfloat16


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


def assert_bits_of_two_launches(
    weight: CudaWeight, tokens: int, gain: Tensor, dtype: torch.dtype, tile: Tile
) -> None:
    rows, columns = weight.shape
    x, residual = make_activation(tokens, columns), torch.randn(tokens, rows).cuda().to(dtype)
    product = weight.apply_tile(x, None, dtype, tile)
    expected, expected_total = rms_norm_quantize(product, gain, EPS, residual)
    for _ in range(2):  # what blocks share is as it was
        out, total = gemm_norm_cuda.linear_rms_norm_quantize(
            x, weight, None, dtype, gain, EPS, residual, tile
        )
        assert torch.equal(total, expected_total), (rows, tokens)
        assert_same(out, expected)
        assert bool((weight.inbox == -1).all() and (weight.progress == 0).all())


@pytest.mark.parametrize("tile", SMALL_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_small_tile(tile: Tile, dtype: torch.dtype) -> None:
    for rows, columns in ((576, 1536), (4096, 512)):
        weight = prepare(rows, columns, 128)
        gain = (torch.rand(rows, device="cuda") + 0.5).to(dtype)
        for tokens in (1, 5, tile.tokens, 2 * tile.tokens + 37):
            assert_bits_of_two_launches(weight, tokens, gain, dtype, tile)


@pytest.mark.parametrize("tile", LARGE_TILES, ids=str)
@pytest.mark.parametrize(("group_size", "gain_dtype"), [(128, DTYPE), (-1, torch.float32)])
def test_every_large_tile(tile: Tile, group_size: int, gain_dtype: torch.dtype) -> None:
    """Waves of every fullness, the last one split along K where the tile can be; odd sizes."""
    for rows, columns in ((2048, 384), (4096, 1024), (5184, 640), (8192, 512)):
        weight = prepare(rows, columns, group_size)
        gain = (torch.rand(rows, device="cuda") + 0.5).to(gain_dtype)
        for tokens in (1, 257, 300, 1000, 1025, 4096):
            assert_bits_of_two_launches(weight, tokens, gain, DTYPE, tile)


def chain(
    x: QuantizedActivation, weight: CudaWeight, gain: Tensor, residual: Tensor, tile: Tile | None
) -> tuple[QuantizedActivation, Tensor]:
    """tile: of the launches that do both."""
    for _ in range(40):
        if tile is not None:
            x, residual = gemm_norm_cuda.linear_rms_norm_quantize(
                x, weight, None, torch.float16, gain, EPS, residual, tile
            )
        else:
            product = quantized_linear(x, weight, None, torch.float16)
            x, residual = rms_norm_quantize(product, gain, EPS, residual)
    return x, residual


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [
        (1, Tile("small", 64, 16, cluster=2, interleave=4)),
        (7, Tile("small", 64, 16, cluster=2, interleave=4)),
        (64, Tile("small", 64, 64, cluster=2, interleave=2)),
        (513, Tile("large", 128, 128)),
        (3000, Tile("large", 128, 256, cluster=2)),
    ],
)
def test_launches_in_a_row_and_graph_replays(tokens: int, tile: Tile) -> None:
    """Each launch starts while the one before still runs, and shares memory with it."""
    weight, gain = prepare(1024, 1024, 128), torch.rand(1024, device="cuda") / 64
    x, residual = make_activation(tokens, 1024), torch.randn(tokens, 1024, device="cuda").half()
    chain(x, weight, gain, residual, tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(x, weight, gain, residual, tile)
    for _ in range(3):
        fresh = make_activation(tokens, 1024)
        for captured, new in zip(vars(x).values(), vars(fresh).values(), strict=True):
            captured.copy_(new)
        graph.replay()
        expected = chain(x, weight, gain, residual, None)
        assert torch.equal(found[1], expected[1])
        assert_same(found[0], expected[0])
    assert bool((weight.inbox == -1).all() and (weight.progress == 0).all())


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


@pytest.mark.parametrize("rows", [4096, 1024])
def test_one_launch_or_two(rows: int) -> None:
    weight, gain = prepare(rows, 1024, -1), torch.ones(rows, device="cuda").half()
    for tokens, fits in ((1, True), (33, True), (128, True), (1024, False), (4096, True)):
        launches = 1 if fits and rows == 4096 else 2
        x, residual = make_activation(tokens, 1024), torch.zeros(tokens, rows).cuda().half()
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


@pytest.mark.parametrize(("tokens", "per_layer"), [(1, 5), (64, 5), (1024, 7), (4096, 5)])
def test_launches_of_a_decoder_layer(tokens: int, per_layer: int) -> None:
    """Attention aside; the first norm has no GEMM before it, the last GEMM no quantized norm after."""
    layers = [make_layer(4096, 1536) for _ in range(3)]
    attend = FixedAttention(tokens, 4096)
    x: Addend = torch.randn(tokens, 4096, device="cuda").half()
    residual = None
    with count_launches() as launched:
        for index, layer in enumerate(layers):
            x, residual = layer(x, residual, attend, index)
        layers[0].attention_norm(x, residual)
    fused = 7 - per_layer
    assert len(launched) == 3 * per_layer + 1 + fused // 2
