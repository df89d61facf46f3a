"""The Hopper GEMM for many tokens, its own code, run on a CPU under random schedules."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from emulator import Emulator, tensor_map

from qserve.formats.activation import quantize_activation
from qserve.formats.grid import fit_grid
from qserve.formats.weight import QuantizedWeight, W8Weight
from qserve.kernels import gemm_cuda, jit
from qserve.kernels.gemm import reference_linear
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_variants import gemm_kernel
from qserve.kernels.jit import Kernel
from qserve.kernels.tiles import Device, Tile

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

MULTIPROCESSORS = 2


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """Every kernel launched in this module runs here, on a device of few multiprocessors."""
    emulator = Emulator(tmp_path_factory.mktemp("emulator"))
    device = Device("emulated", "sm_90a", MULTIPROCESSORS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "CSRC", emulator.sources)
        patch.setattr(gemm_cuda, "_device", lambda _: device)
        patch.setattr(gemm_cuda, "tensor_map", tensor_map)
        patch.setattr(Kernel, "__call__", lambda *arguments: emulator.launch(*arguments))
        yield emulator


def quantized(weight: torch.Tensor, weight_format: str) -> QuantizedWeight:
    if weight_format == "int8":
        return W8Weight.quantize(weight)
    grid = fit_grid(weight, {"channel": -1, "group64": 64, "group128": 128}[weight_format])
    return grid.pack(grid.quantize(weight))


@pytest.mark.parametrize(
    ("rows", "tokens", "weight_format"),
    [
        (128, 256, "group128"),
        (128, 256, "channel"),
        (128, 256, "int8"),  # with the fewest stages
        (128, 128, "group128"),
        (256, 128, "group64"),
    ],
)
def test_many_tokens(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    tokens: int,
    weight_format: str,
) -> None:
    tile = Tile("large", rows, tokens)
    for seed, longest_copy in enumerate((20000, 200, 5000, 60000)):
        monkeypatch.setattr(emulator, "seed", seed)
        monkeypatch.setattr(emulator, "longest_copy", longest_copy)
        n, k, m = ((192, 640, 70), (320, 1024, 300), (64, 128, 5), (448, 384, 513))[seed]
        assert is_exact(tile, quantized(torch.randn(n, k), weight_format), m), (n, k, m)


def is_exact(tile: Tile, weight: QuantizedWeight, tokens: int) -> bool:
    x = quantize_activation(torch.randn(tokens, weight.shape[1]))
    bias = torch.randn(weight.shape[0])
    found = CudaWeight._repack(weight).apply_tile(x, bias, torch.bfloat16, tile)
    return torch.equal(found, reference_linear(x, weight, bias, torch.bfloat16))


def test_a_stage_released_under_a_multiply_is_caught(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = emulator.sources / "w4a8_gemm_large_sm90.cu"
    text = source.read_text()
    assert "wgmma_wait<1>();" in text
    monkeypatch.setattr(gemm_cuda, "gemm_kernel", gemm_kernel.__wrapped__)
    try:
        source.write_text(text.replace("wgmma_wait<1>();", ""))
        weight = quantized(torch.randn(128, 1024), "group128")
        assert not is_exact(Tile("large", 128, 256), weight, 256)
    finally:
        source.write_text(text)
