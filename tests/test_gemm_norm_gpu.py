"""A GEMM that goes on with a norm gives the bits of the two launches it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from norm_helpers import assert_ready, assert_same
from torch import Tensor

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.grid import fit_grid
from qserve.kernels import gemm_norm_cuda, quantized_linear, rms_norm_quantize
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_norm import linear_rms_norm_quantize
from qserve.kernels.gemm_norm_cuda import NORM_TILES
from qserve.kernels.jit import listing, warm_up
from qserve.kernels.tiles import Tile, tiles_for
from qserve.models.decoder import DecoderLayer
from qserve.models.layers import Addend, QuantizedLinear, RMSNorm
from qserve.testing.launches import count_launches

pytestmark = pytest.mark.gpu

EPS = 1e-5
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SMALL_TILES = [tile for tile in tiles_for("sm_90a") if tile.kind == "small"]


@cache
def prepare(rows: int, columns: int, group_size: int) -> CudaWeight:
    grid = fit_grid(torch.randn(rows, columns, device="cuda"), group_size)
    weight = grid.pack(grid.quantize(torch.randn(rows, columns, device="cuda")))
    return CudaWeight.prepare(weight, torch.device("cuda"))


def make_activation(tokens: int, columns: int) -> QuantizedActivation:
    return quantize_activation(torch.randn(tokens, columns, device="cuda"))


class Inputs(NamedTuple):
    x: QuantizedActivation
    bias: Tensor | None
    gain: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Case:
    """Types: of the outputs and of the norm's gain; of a bias, if there is one."""

    tile: Tile
    shape: tuple[int, int]
    group_size: int
    dtype: torch.dtype
    gain_dtype: torch.dtype
    bias_dtype: torch.dtype | None = None

    @property
    def weight(self) -> CudaWeight:
        return prepare(*self.shape, self.group_size)

    def inputs(self, tokens: int) -> Inputs:
        rows, columns = self.shape
        biased = self.bias_dtype is not None
        return Inputs(
            make_activation(tokens, columns),
            torch.randn(rows, device="cuda").to(self.bias_dtype) if biased else None,
            (torch.rand(rows, device="cuda") + 0.5).to(self.gain_dtype),
            torch.randn(tokens, rows, device="cuda").to(self.dtype),
        )

    def two_launches(self, given: Inputs) -> tuple[QuantizedActivation, Tensor]:
        out = self.weight.apply_tile(given.x, given.bias, self.dtype, self.tile)
        return rms_norm_quantize(out, given.gain, EPS, given.residual)

    def one_launch(self, given: Inputs) -> tuple[QuantizedActivation, Tensor]:
        return gemm_norm_cuda.linear_rms_norm_quantize(
            given.x,
            self.weight,
            given.bias,
            self.dtype,
            given.gain,
            EPS,
            given.residual,
            self.tile,
        )


def assert_same_bits(cases: Sequence[Case], sizes: Sequence[int]) -> None:
    """Of one launch and of two, with kernels that are compiled beforehand, in parallel."""
    with listing() as kernels:
        for case in cases:
            given = case.inputs(1)
            case.two_launches(given), case.one_launch(given)
    warm_up(kernels, torch.device("cuda"))
    for case, tokens in product(cases, sizes):
        given = case.inputs(tokens)
        expected, expected_total = case.two_launches(given)
        for _ in range(2):  # what launches share is as it was
            found, total = case.one_launch(given)
            assert torch.equal(total, expected_total), (case, tokens)
            assert_same(found, expected)
            assert_ready(case.weight)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.usefixtures("poisoned_outputs")
def test_every_small_tile(dtype: torch.dtype) -> None:
    cases = [
        Case(tile, shape, 128, dtype, dtype)
        for tile, shape in product(SMALL_TILES, [(576, 1536), (4096, 512)])
    ]
    assert_same_bits(cases, (1, 5, 16, 69, 165, 293))


@pytest.mark.parametrize(("group_size", "gain_dtype"), [(128, BRAIN), (-1, FULL)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("poisoned_outputs")
def test_every_large_tile(group_size: int, gain_dtype: torch.dtype, biased: bool) -> None:
    """Waves of every fullness; rows of an odd number of slabs."""
    cases = [
        Case(tile, shape, group_size, BRAIN, gain_dtype, gain_dtype if biased else None)
        for tile, shape in product(
            NORM_TILES, [(2048, 384), (4096, 1024), (5184, 640), (8192, 512)]
        )
    ]
    assert_same_bits(cases, (1, 257, 300, 511, 1000, 1025, 2048, 4096))


def chain(
    x: QuantizedActivation, weight: CudaWeight, gain: Tensor, residual: Tensor, tile: Tile | None
) -> tuple[QuantizedActivation, Tensor]:
    """tile: of the launches that do both."""
    for _ in range(40):
        if tile is not None:
            x, residual = gemm_norm_cuda.linear_rms_norm_quantize(
                x, weight, None, HALF, gain, EPS, residual, tile
            )
        else:
            product = quantized_linear(x, weight, None, HALF)
            x, residual = rms_norm_quantize(product, gain, EPS, residual)
    return x, residual


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [
        (1, Tile("small", 64, 16, cluster=2, interleave=4)),
        (7, Tile("small", 64, 16, cluster=2, interleave=4)),
        (64, Tile("small", 64, 64, cluster=2, interleave=2)),
        (513, Tile("large", 128, 128)),
        (5000, Tile("large", 128, 256)),  # of two waves
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
    assert_ready(weight)


@pytest.mark.parametrize("tile", [SMALL_TILES[0], *NORM_TILES], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.usefixtures("poisoned_outputs")
def test_outputs_that_are_no_numbers_are_outputs(dtype: torch.dtype, tile: Tile) -> None:
    """No result is what the inbox holds where there is none, else this would never end."""
    weight, gain = prepare(2048, 1024, 128), torch.ones(2048, device="cuda").to(dtype)
    x, residual = make_activation(4, 1024), torch.zeros(4, 2048, device="cuda").to(dtype)
    x.scale[:] = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
    out = quantized_linear(x, weight, None, dtype)
    assert out.isnan()[:2].all() and out.isinf()[2:].any()
    assert (out.view(torch.int16) != -1).all()
    expected, expected_total = rms_norm_quantize(out, gain, EPS, residual)
    found, total = gemm_norm_cuda.linear_rms_norm_quantize(
        x, weight, None, dtype, gain, EPS, residual, tile
    )
    torch.testing.assert_close(total, expected_total, rtol=0, atol=0, equal_nan=True)
    assert_same(found, expected)
    assert_ready(weight)


@pytest.mark.parametrize("rows", [4096, 8192])
@pytest.mark.usefixtures("poisoned_outputs")
def test_a_token_does_not_know_its_batch(rows: int) -> None:
    """Whichever kernels make it, in one launch or two, and wherever it stands."""
    weight, gain = prepare(rows, 1024, 128), torch.rand(rows, device="cuda")
    x, residual = make_activation(2000, 1024), torch.randn(2000, rows, device="cuda").half()
    given = (*vars(x).values(), residual)

    def run(tokens: slice) -> tuple[list[Tensor], str]:
        *parts, addend = (tensor[tokens].contiguous() for tensor in given)
        with count_launches() as launched:
            out, total = linear_rms_norm_quantize(
                QuantizedActivation(*parts), weight, None, HALF, gain, EPS, addend
            )
        return [*vars(out).values(), total], launched[-1].entry

    expected, _ = run(slice(0, 2000))
    entries = set()
    for first, last in ((0, 1), (1999, 2000), (700, 705), (60, 124), (0, 300), (1000, 2000)):
        found, entry = run(slice(first, last))
        entries.add(entry)
        for tensor, of_all in zip(found, expected, strict=True):
            assert torch.equal(tensor, of_all[first:last]), (first, last)
    assert {"w4a8_gemm_small_norm", "w4a8_gemm_large_norm"} <= entries


@pytest.mark.parametrize(("rows", "launches"), [(4096, 1), (1024, 2)])
def test_one_launch_or_two(rows: int, launches: int) -> None:
    weight, gain = prepare(rows, 4096, -1), torch.ones(rows, device="cuda").half()
    for tokens in (1, 33, 128, 300, 1024, 2048, 4096):
        x, residual = make_activation(tokens, 4096), torch.zeros(tokens, rows).cuda().half()
        with count_launches() as launched:
            linear_rms_norm_quantize(x, weight, None, HALF, gain, EPS, residual)
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
        return QuantizedLinear(prepare(rows, columns, 128), None, HALF)

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


@pytest.mark.parametrize("tokens", [1, 64, 300, 768, 1024, 1536, 2048, 4096])
def test_launches_of_a_decoder_layer(tokens: int) -> None:
    """Five, attention aside; the first norm has no GEMM before it, the last GEMM no quantized norm
    after."""
    layers = [make_layer(4096, 14336) for _ in range(3)]
    attend = FixedAttention(tokens, 4096)
    x: Addend = torch.randn(tokens, 4096, device="cuda").half()
    residual = None
    with count_launches() as launched:
        for index, layer in enumerate(layers):
            x, residual = layer(x, residual, attend, index)
        layers[0].attention_norm(x, residual)
    assert len(launched) == 3 * 5 + 2
