"""GEMMs that go on with a norm, their own code, run on a CPU under random schedules: the bits of two
launches."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from emulated_gemm import device_of, emulated_launches, planted, quantized
from emulator import EmulationError, Emulator
from norm_helpers import assert_ready, assert_same
from torch import Tensor

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.kernels import gemm_cuda, producers_cuda, rms_norm_quantize
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_norm_cuda import linear_rms_norm_quantize
from qserve.kernels.tiles import Tile

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

EPS = 1e-5
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """On a device of four multiprocessors, which hold all row tiles of one or two token tiles."""
    with emulated_launches(tmp_path_factory.mktemp("emulator"), 4) as emulator:
        yield emulator


@dataclass(frozen=True)
class Case:
    """A linear and the norm after it, and what two launches make of them."""

    x: QuantizedActivation
    weight: CudaWeight
    bias: Tensor | None
    gain: Tensor
    residual: Tensor
    expected: QuantizedActivation
    expected_total: Tensor

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        gain_dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
        scales: Tensor | None = None,
    ) -> Case:
        """shape: rows, columns, tokens. scales: of the tokens; else of many magnitudes, some zeros."""
        rows, columns, tokens = shape
        magnitudes = 10 ** torch.linspace(-2, 2, tokens)
        magnitudes[6::7] = 0
        weight = CudaWeight._repack(quantized(torch.randn(rows, columns), "group128"))
        x = quantize_activation(torch.randn(tokens, columns) * magnitudes[:, None])
        if scales is not None:
            x.scale[:] = scales
        bias = None if bias_dtype is None else torch.randn(rows).to(bias_dtype)
        gain = (torch.randn(rows) * 2).to(gain_dtype)
        residual = (torch.randn(tokens, rows) * magnitudes[:, None]).to(dtype)
        product = weight.apply_tile(x, bias, dtype, Tile("large", 128, 128))
        expected = producers_cuda.rms_norm_quantize(product, gain, EPS, residual)
        return cls(x, weight, bias, gain, residual, *expected)

    def assert_given_by(self, tile: Tile, emulator: Emulator) -> None:
        """By one launch, which leaves all as it was for the next."""
        dtype = self.residual.dtype
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulator, "side_by_side", True)  # since its blocks wait for each other
            found, total = linear_rms_norm_quantize(
                self.x, self.weight, self.bias, dtype, self.gain, EPS, self.residual, tile
            )
        torch.testing.assert_close(total, self.expected_total, rtol=0, atol=0, equal_nan=True)
        assert_same(found, self.expected)
        assert (behind(found.codes) == -128).all(), "what no output is has been written"
        assert_ready(self.weight)


def behind(codes: Tensor) -> Tensor:
    """The room that there is behind codes."""
    columns = codes.shape[1]
    rows = codes.untyped_storage().nbytes() // columns
    return codes.as_strided((rows, columns), (columns, 1))[len(codes) :]


@pytest.mark.parametrize(
    ("columns", "dtype", "gain_dtype"),
    [(320, HALF, FULL), (256, BRAIN, BRAIN), (14336, HALF, HALF)],
)
def test_a_norm_by_itself_is_the_reference(
    emulator: Emulator, columns: int, dtype: torch.dtype, gain_dtype: torch.dtype
) -> None:
    """But for sums of squares in float32, which move a value over a rounding boundary, and rarely."""
    x, residual = torch.randn(9, columns).to(dtype), torch.randn(9, columns).to(dtype) * 4
    gain = (torch.rand(columns) + 0.5).to(gain_dtype)
    found, total = producers_cuda.rms_norm_quantize(x, gain, EPS, residual)
    expected, expected_total = rms_norm_quantize(x, gain, EPS, residual)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(found.scale, expected.scale, rtol=2e-6, atol=0)
    steps = (found.codes.int() - expected.codes.int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3
    assert torch.equal(found.row_sum, found.codes.sum(1, dtype=torch.int32))


SMALL, LARGE = Tile("small", 128, 16), Tile("large", 128, 128)
LONG = Tile("large", 128, 256)


@pytest.mark.parametrize(
    ("tile", "shape", "dtypes"),
    [
        (SMALL, (320, 256, 1), (HALF, FULL, None)),
        (SMALL, (320, 256, 5), (HALF, FULL, None)),
        (SMALL, (256, 256, 37), (BRAIN, BRAIN, BRAIN)),
        (Tile("small", 64, 16, cluster=2, interleave=2), (192, 256, 37), (BRAIN, FULL, FULL)),
        (LARGE, (320, 128, 1), (HALF, FULL, None)),
        (LARGE, (320, 256, 300), (HALF, FULL, None)),  # three waves of a token tile
        (LARGE, (256, 384, 600), (BRAIN, BRAIN, BRAIN)),  # of two, two and one
        (LONG, (192, 384, 513), (BRAIN, FULL, FULL)),
        (LONG, (320, 128, 257), (HALF, FULL, HALF)),
    ],
    ids=str,
)
def test_a_norm_takes_outputs(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tile: Tile,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
) -> None:
    """dtypes: of the outputs, the gain and the bias."""
    for seed, longest_copy in enumerate((20000, 200)):
        monkeypatch.setattr(emulator, "seed", seed)
        monkeypatch.setattr(emulator, "longest_copy", longest_copy)
        Case.random(shape, *dtypes).assert_given_by(tile, emulator)


def test_a_norm_takes_outputs_of_many_blocks(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more than one asks for at a time."""
    monkeypatch.setattr(gemm_cuda, "_device", lambda _: device_of(17))
    Case.random((2112, 128, 20), HALF, FULL, None).assert_given_by(LARGE, emulator)


@pytest.mark.parametrize("tile", [SMALL, LARGE], ids=str)
def test_outputs_that_are_no_numbers_are_outputs(emulator: Emulator, tile: Tile) -> None:
    """Nothing that is told others is what stands for nothing, else this would never end."""
    scales = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 1e30])
    case = Case.random((320, 256, 5), HALF, FULL, None, scales)
    assert case.expected_total.isnan()[:2].all() and case.expected_total.isinf()[2:].any()
    case.assert_given_by(tile, emulator)


def test_many_tokens_after_few_after_many(emulator: Emulator) -> None:
    """Each launch cleans up after the one before, however much there is."""
    for tokens in (300, 1, 2, 300, 300):
        Case.random((320, 256, tokens), HALF, FULL, None).assert_given_by(LARGE, emulator)


@pytest.mark.parametrize(
    ("tile", "sound", "faulty"),
    [
        (SMALL, "while (!all);", "while (false);"),
        (LARGE, "\n    } while (!all);", "} while (false);"),
        (LARGE, "copy_async_wait<0>();", ""),
        (LARGE, "named_barrier(2 + threadIdx.x / 128, 128);", ""),
        (LARGE, "named_barrier(1, CONSUMER_THREADS);\n    // A thread speaks", "//"),
        (LARGE, "named_barrier(1, CONSUMER_THREADS);\n    share.renew", "share.renew"),
        (LARGE, "named_barrier(1, CONSUMER_THREADS);\n    if (speaks)\n", "if (speaks)"),
        (LARGE, "other[i] = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);", "{}"),
        (LARGE, "turns_->inbox = 1 - own, ", ""),
        (LARGE, "if (column == 0) out_.row_sum[token] = 0;", ""),
    ],
    ids=[
        "few tokens: for outputs",
        "for parts of other blocks",
        "for the residual",
        "for staged outputs",
        "for parts of other warps",
        "for the factors",
        "for sums of other warps",
        "parts are left",
        "an inbox is not handed over",
        "sums start anywhere",
    ],
)
def test_a_fault_is_caught(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tile: Tile, sound: str, faulty: str
) -> None:
    """A wait, a barrier or what is to be done at the end is left out."""
    case = Case.random((320, 256, 100), HALF, FULL, None)
    case.assert_given_by(tile, emulator)
    fault = planted(emulator.sources / f"tail_{tile.kind}.cuh", sound, faulty)
    with fault, pytest.raises((AssertionError, EmulationError)):
        for seed in range(20):
            monkeypatch.setattr(emulator, "seed", seed)
            case.assert_given_by(tile, emulator)
