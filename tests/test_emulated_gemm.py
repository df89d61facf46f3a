"""The Hopper GEMMs, their own code, run on a CPU under random schedules."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from activation_helpers import before_poison
from emulator import EmulationError, Emulator, tensor_map

from qserve.formats.activation import quantize_activation
from qserve.formats.grid import fit_grid
from qserve.formats.weight import QuantizedWeight, W8Weight
from qserve.kernels import gemm_cuda, jit, quantized_linear, rms_norm_quantize
from qserve.kernels.gemm import reference_linear
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_norm_cuda import linear_rms_norm_quantize
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
        weight = quantized(torch.randn(n, k), weight_format)
        assert is_exact(tile, weight, m, biased=seed % 2 == 0), (n, k, m)


@pytest.mark.parametrize(
    ("tokens", "shape", "weight_format"),
    [
        (16, (320, 640, 3), "channel"),
        (32, (192, 640, 37), "group128"),
        (64, (64, 128, 65), "group64"),
        (16, (128, 640, 17), "int8"),
    ],
)
def test_few_tokens(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    shape: tuple[int, int, int],
    weight_format: str,
) -> None:
    """One block after the other."""
    n, k, m = shape
    for seed, longest_copy in enumerate((20000, 200)):
        monkeypatch.setattr(emulator, "seed", seed)
        monkeypatch.setattr(emulator, "longest_copy", longest_copy)
        assert is_exact(Tile("small", 128, tokens), quantized(torch.randn(n, k), weight_format), m)


@pytest.fixture
def two_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two blocks fit the device."""
    monkeypatch.setattr(gemm_cuda, "_device", lambda _: Device("emulated", "sm_90a", 4))


PAIRED_SMALL = Tile("small", 64, 16, cluster=2, interleave=2)
PAIRED_LARGE = Tile("large", 128, 256, cluster=2)


@pytest.mark.parametrize(
    ("tile", "shape", "weight_format"),
    [
        (PAIRED_SMALL, (192, 640, 37), "channel"),
        (PAIRED_SMALL, (64, 128, 3), "group128"),  # one block of the two has nothing to multiply
        (Tile("small", 128, 128, cluster=2), (320, 384, 130), "group64"),
        (PAIRED_LARGE, (320, 640, 300), "group128"),  # tiles for two turns
        (PAIRED_LARGE, (192, 896, 600), "channel"),  # the last one split along K
        (PAIRED_LARGE, (64, 384, 5), "int8"),
    ],
)
@pytest.mark.usefixtures("two_clusters")
def test_clusters(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tile: Tile,
    shape: tuple[int, int, int],
    weight_format: str,
) -> None:
    n, k, m = shape
    for seed, longest_copy in enumerate((20000, 200)):
        monkeypatch.setattr(emulator, "seed", seed)
        monkeypatch.setattr(emulator, "longest_copy", longest_copy)
        assert is_exact(tile, quantized(torch.randn(n, k), weight_format), m)


def assert_norm_takes_outputs(tile: Tile, rows: int, columns: int, tokens: int) -> None:
    """Blocks share out the rows, and leave all as it was for the next launch."""
    weight = CudaWeight._repack(quantized(torch.randn(rows, columns), "group128"))
    x, residual = (
        quantize_activation(torch.randn(tokens, columns)),
        torch.randn(tokens, rows).half(),
    )
    gain = torch.rand(rows) + 0.5
    found, total = linear_rms_norm_quantize(
        x, weight, None, torch.float16, gain, 1e-5, residual, tile
    )
    product = quantized_linear(x, weight, None, torch.float16)
    expected, expected_total = rms_norm_quantize(product, gain, 1e-5, residual)
    assert torch.equal(total, expected_total)
    assert (found.codes.int() - expected.codes.int()).abs().max() <= 1
    assert torch.equal(found.row_sum, found.codes.sum(1, dtype=torch.int32))
    torch.testing.assert_close(found.scale, expected.scale)
    assert (weight.inbox == -1).all() and (weight.progress == 0).all()


@pytest.fixture
def side_by_side(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run at the same time, as those of a launch that goes on with a norm must."""
    monkeypatch.setattr(emulator, "side_by_side", True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("side_by_side")
def test_a_norm_takes_outputs_as_they_come(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(emulator, "seed", seed)
    assert_norm_takes_outputs(Tile("small", 128, 16), 192, 256, 1 + 2 * seed)


@pytest.mark.parametrize(
    ("rows", "tokens", "shape"),
    [
        (128, 128, (256, 256, 5)),
        (128, 128, (384, 128, 300)),
        (128, 256, (192, 384, 513)),
        (256, 128, (320, 128, 257)),
    ],
)
@pytest.mark.usefixtures("side_by_side")
def test_a_norm_takes_outputs_of_many_tokens(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    tokens: int,
    shape: tuple[int, int, int],
) -> None:
    """Three tiles of a token tile for two blocks; outputs that do not fill a tile; one row and many."""
    monkeypatch.setattr(emulator, "seed", shape[0])
    assert_norm_takes_outputs(Tile("large", rows, tokens), *shape)


@pytest.mark.parametrize(
    ("tile", "shape"),
    [
        (PAIRED_SMALL, (192, 256, 37)),
        (PAIRED_LARGE, (192, 384, 600)),
        (PAIRED_LARGE, (576, 256, 257)),
    ],
)
@pytest.mark.usefixtures("side_by_side", "two_clusters")
def test_a_norm_takes_outputs_of_clusters(tile: Tile, shape: tuple[int, int, int]) -> None:
    assert_norm_takes_outputs(tile, *shape)


@contextmanager
def planted(source: Path, sound: str, faulty: str) -> Iterator[None]:
    """The kernel's source with a fault in it."""
    text = source.read_text()
    assert sound in text
    try:
        source.write_text(text.replace(sound, faulty))
        yield
    finally:
        source.write_text(text)


SMALL, LARGE = Tile("small", 128, 16), Tile("large", 128, 128)


@pytest.mark.parametrize(
    ("tile", "file", "sound", "faulty"),
    [
        (SMALL, "tail_small.cuh", "while (!all);", "while (false);"),
        (LARGE, "tail_large.cuh", "load_acquire_grid(&stored[own]) >= halves", "true"),
        (LARGE, "tail_large.cuh", "load_acquire_block(&confirmed) <", "0 >"),
    ],
    ids=["for outputs", "for tiles of other blocks", "for its own tile"],
)
@pytest.mark.usefixtures("side_by_side")
def test_a_norm_that_does_not_wait_is_caught(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tile: Tile,
    file: str,
    sound: str,
    faulty: str,
) -> None:
    monkeypatch.setattr(gemm_cuda, "gemm_kernel", gemm_kernel.__wrapped__)
    fault = planted(emulator.sources / file, sound, faulty)
    with fault, pytest.raises(AssertionError):
        assert_norm_takes_outputs(tile, 384, 512, 3)  # of three tiles, one block makes two


def is_exact(tile: Tile, weight: QuantizedWeight, tokens: int, biased: bool = True) -> bool:
    x = quantize_activation(torch.randn(tokens, weight.shape[1]))
    bias = torch.randn(weight.shape[0]) if biased else None
    expected = reference_linear(x, weight, bias, torch.bfloat16)
    prepared = CudaWeight._repack(weight)
    return all(
        torch.equal(prepared.apply_tile(given, bias, torch.bfloat16, tile), expected)
        for given in (x, before_poison(x))
    )


def test_a_stage_released_under_a_multiply_is_caught(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_cuda, "gemm_kernel", gemm_kernel.__wrapped__)
    weight = quantized(torch.randn(128, 1024), "group128")
    with planted(emulator.sources / "w4a8_gemm_large_sm90.cuh", "wgmma_wait<1>();", ""):
        assert not is_exact(Tile("large", 128, 256), weight, 256)


@pytest.mark.parametrize(
    ("tile", "file", "sound", "faulty"),
    [
        (PAIRED_SMALL, "small_sm90.cuh", "if (CLUSTER > 1) cluster_sync();", ""),
        (PAIRED_SMALL, "small_sm90.cu", "await_peers();", ""),
        (PAIRED_LARGE, "large_sm90.cuh", "  cluster_sync();\n  const", "  const"),
        (PAIRED_LARGE, "large_sm90.cuh", "CONSUMER_WARPS * CLUSTER *", "CONSUMER_WARPS *"),
    ],
    ids=[
        "for a peer's sums",
        "for who reads its own",
        "for half of the sums",
        "for a stage's readers",
    ],
)
@pytest.mark.usefixtures("two_clusters")
def test_a_cluster_that_does_not_wait_is_caught(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tile: Tile,
    file: str,
    sound: str,
    faulty: str,
) -> None:
    monkeypatch.setattr(gemm_cuda, "gemm_kernel", gemm_kernel.__wrapped__)
    weight = quantized(torch.randn(192, 1024), "group128")
    fault = planted(emulator.sources / f"w4a8_gemm_{file}", sound, faulty)
    with fault, pytest.raises((AssertionError, EmulationError)):
        assert is_exact(tile, weight, 600)
