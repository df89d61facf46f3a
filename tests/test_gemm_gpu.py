"""W4A8 GEMM on a GPU: the bits of the reference, for every variant, tile and odd size."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from activation_helpers import before_poison

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.grid import ChannelGrid, fit_grid
from qserve.formats.weight import QuantizedWeight, W4Weight, W8Weight
from qserve.kernels import OpError, prepare_weight, quantized_linear
from qserve.kernels.compile import POLICIES
from qserve.kernels.gemm import ExactFloatWeight
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_variants import gemm_kernel
from qserve.kernels.jit import warm_up
from qserve.kernels.tiles import Tile, tiles_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

ALL_TILES = tiles_for("sm_90a") + tiles_for("sm_80")
OUTPUTS = ((torch.float16, True), (torch.bfloat16, False))
"""Types, and whether there is a bias."""

WEIGHT_FORMATS = ("channel", "fractional", "group64", "group128", "int8")
LAYER_SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
SMOLLM2_SHAPES = [(960, 576), (192, 576), (576, 576), (3072, 576), (576, 1536)]


@pytest.fixture(scope="module", autouse=True)
def _compiled_in_parallel() -> None:
    kernels = [
        gemm_kernel(tile, policy, dtype == torch.bfloat16, biased)
        for tile, policy, (dtype, biased) in itertools.product(ALL_TILES, POLICIES, OUTPUTS)
    ]
    warm_up(kernels, torch.device("cuda"))


def make_weight(weight_format: str, rows: int, columns: int) -> QuantizedWeight:
    weight = torch.randn(rows, columns, device="cuda") * torch.rand(rows, 1, device="cuda")
    if weight_format == "int8":
        return W8Weight.quantize(weight)
    group_size = {"group64": 64, "group128": 128}.get(weight_format, -1)
    grid = fit_grid(weight, group_size)
    packed = grid.pack(grid.quantize(weight)).validate()
    if weight_format == "fractional":
        assert isinstance(grid, ChannelGrid) and packed.s1_szeros is not None
        packed = W4Weight(packed.qweight, packed.s1_scales, packed.s1_szeros * 1.05)
        assert (packed.zeros() != packed.zeros().round()).any()
    return packed


@cache
def prepared_weight(
    weight_format: str, rows: int, columns: int
) -> tuple[QuantizedWeight, CudaWeight]:
    weight = make_weight(weight_format, rows, columns)
    return weight, CudaWeight.prepare(weight, torch.device("cuda"))


def make_activation(tokens: int, columns: int) -> QuantizedActivation:
    return quantize_activation(torch.randn(tokens, columns, device="cuda") * 3)


def expected_linear(
    x: QuantizedActivation, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The reference's chunked exact arithmetic, which float32 on the GPU carries out exactly too."""
    return ExactFloatWeight.prepare(weight).apply(x, bias, dtype)


def group_size_fits(weight_format: str, columns: int) -> bool:
    return weight_format != "group128" or columns % 128 == 0


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("tile", ALL_TILES, ids=str)
def test_every_tile_gives_the_reference_bits(tile: Tile, weight_format: str) -> None:
    for rows, columns in ((64, 64), (192, 576), (576, 1536), (1088, 128), (320, 4224)):
        if not group_size_fits(weight_format, columns):
            continue
        weight, prepared = prepared_weight(weight_format, rows, columns)
        for index, tokens in enumerate((1, 17, tile.tokens, 2 * tile.tokens + 37)):
            dtype, biased = OUTPUTS[index % 2]
            x = make_activation(tokens, columns)
            bias = torch.randn(rows, device="cuda") if biased else None
            expected = expected_linear(x, weight, bias, dtype)
            for given in (x, before_poison(x)):
                out = prepared.apply_tile(given, bias, dtype, tile)
                assert torch.equal(out, expected), (rows, columns, tokens)


@pytest.mark.parametrize("shape", LAYER_SHAPES + SMOLLM2_SHAPES, ids=str)
@pytest.mark.parametrize("weight_format", ["channel", "group64", "group128", "int8"])
def test_layers_of_real_models(shape: tuple[int, int], weight_format: str) -> None:
    rows, columns = shape
    if not group_size_fits(weight_format, columns):
        pytest.skip("128 does not divide K")
    weight, prepared = prepared_weight(weight_format, rows, columns)
    for tokens in (1, 2, 16, 33, 64, 127, 128, 255, 512, 1023, 2048):
        x = make_activation(tokens, columns)
        bias = torch.randn(rows, device="cuda").bfloat16()
        expected = expected_linear(x, weight, bias, torch.bfloat16)
        for _ in range(3):
            assert torch.equal(quantized_linear(x, prepared, bias, torch.bfloat16), expected), (
                tokens
            )


@pytest.mark.parametrize("tile", [t for t in ALL_TILES if t.kind == "large"], ids=str)
def test_many_waves_and_split_tails(tile: Tile) -> None:
    """Grids larger than the GPU, and last waves of every fullness."""
    weight, prepared = prepared_weight("group128", 4480, 1920)
    for tokens in (129, 700, 1025, 1900, 3001):
        x = make_activation(tokens, 1920)
        out = prepared.apply_tile(x, None, torch.float16, tile)
        assert torch.equal(out, expected_linear(x, weight, None, torch.float16)), tokens


def test_extreme_codes() -> None:
    """The largest sums: every code and activation at its bound."""
    weight = fit_grid(torch.ones(64, 14336), 128).pack(torch.full((64, 14336), 15).byte())
    weight = W4Weight(**{name: tensor.cuda() for name, tensor in weight.tensors().items()})
    x = quantize_activation(-torch.ones(3, 14336, device="cuda"))
    out = quantized_linear(x, prepare_weight(weight, "cuda"), None, torch.bfloat16)
    assert torch.equal(out, expected_linear(x, weight, None, torch.bfloat16))


def test_captured_in_a_cuda_graph() -> None:
    weight = make_weight("group128", 512, 512)
    prepared = prepare_weight(weight, "cuda")
    x = make_activation(40, 512)
    quantized_linear(x, prepared, None, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantized_linear(x, prepared, None, torch.float16)
    fresh = make_activation(40, 512)
    for captured, new in zip(vars(x).values(), vars(fresh).values(), strict=True):
        captured.copy_(new)
    graph.replay()
    assert torch.equal(out, expected_linear(fresh, weight, None, torch.float16))


def test_no_tokens_give_no_rows() -> None:
    prepared = prepare_weight(make_weight("channel", 64, 64), "cuda")
    x = QuantizedActivation(
        torch.empty(0, 64, dtype=torch.int8, device="cuda"),
        torch.empty(0, device="cuda"),
        torch.empty(0, dtype=torch.int32, device="cuda"),
    )
    assert quantized_linear(x, prepared, None, torch.float16).shape == (0, 64)


def test_what_the_kernels_do_not_take() -> None:
    prepared = prepare_weight(make_weight("channel", 64, 128), "cuda")
    x = make_activation(4, 128)
    with pytest.raises(OpError, match="16 bits"):
        quantized_linear(x, prepared, None, torch.float32)
    strided = QuantizedActivation(make_activation(128, 4).codes.T, x.scale, x.row_sum)
    with pytest.raises(OpError, match="codes must be contiguous"):
        quantized_linear(strided, prepared, None, torch.float16)
    with pytest.raises(OpError, match="scale is on cpu"):
        moved = QuantizedActivation(x.codes, x.scale.cpu(), x.row_sum)
        quantized_linear(moved, prepared, None, torch.float16)
    on_cpu = QuantizedActivation(*(tensor.cpu() for tensor in vars(x).values()))
    with pytest.raises(OpError, match="codes is on cpu, the weight on cuda:0"):
        quantized_linear(on_cpu, prepared, None, torch.float16)
