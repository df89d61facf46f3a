"""The Hopper GEMMs, their own code, run on a CPU under random schedules."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from activation_helpers import before_poison
from emulated_gemm import device_of, emulated_launches, planted, quantized
from emulator import EmulationError, Emulator

from qserve.formats.activation import quantize_activation
from qserve.formats.weight import QuantizedWeight
from qserve.kernels import gemm_cuda
from qserve.kernels.gemm import reference_linear
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.tiles import Tile

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.usefixtures("poisoned_outputs"),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """On a device of two multiprocessors, so that blocks have several tiles."""
    with emulated_launches(tmp_path_factory.mktemp("emulator"), 2) as emulator:
        yield emulator


def is_exact(tile: Tile, weight: QuantizedWeight, tokens: int, biased: bool = True) -> bool:
    x = quantize_activation(torch.randn(tokens, weight.shape[1]))
    bias = torch.randn(weight.shape[0]) if biased else None
    expected = reference_linear(x, weight, bias, torch.bfloat16)
    prepared = CudaWeight._repack(weight)
    return all(
        torch.equal(prepared.apply_tile(given, bias, torch.bfloat16, tile), expected)
        for given in (x, before_poison(x))
    )


@pytest.mark.parametrize(
    ("rows", "tokens", "weight_format", "biased"),
    [
        (128, 256, "group128", True),
        (128, 256, "channel", False),
        (128, 256, "int8", True),  # with the fewest stages
        (128, 128, "group128", False),
        (256, 128, "group64", True),
    ],
)
def test_many_tokens(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    tokens: int,
    weight_format: str,
    biased: bool,
) -> None:
    tile = Tile("large", rows, tokens)
    for seed, longest_copy in enumerate((20000, 200, 5000, 60000)):
        monkeypatch.setattr(emulator, "seed", seed)
        monkeypatch.setattr(emulator, "longest_copy", longest_copy)
        n, k, m = ((192, 640, 70), (320, 1024, 300), (64, 128, 5), (448, 384, 513))[seed]
        weight = quantized(torch.randn(n, k), weight_format)
        assert is_exact(tile, weight, m, biased), (n, k, m)


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
    monkeypatch.setattr(gemm_cuda, "_device", lambda _: device_of(4))


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


def test_a_stage_released_under_a_multiply_is_caught(emulator: Emulator) -> None:
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
    emulator: Emulator, tile: Tile, file: str, sound: str, faulty: str
) -> None:
    weight = quantized(torch.randn(192, 1024), "group128")
    fault = planted(emulator.sources / f"w4a8_gemm_{file}", sound, faulty)
    with fault, pytest.raises((AssertionError, EmulationError)):
        assert is_exact(tile, weight, 600)
