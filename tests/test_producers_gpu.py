"""Producers on a GPU against their CPU references."""

from __future__ import annotations

import pytest
import torch

from qserve.formats.activation import QuantizedActivation
from qserve.kernels import (
    OpError,
    quantize_per_token,
    rms_norm,
    rms_norm_quantize,
    silu_mul_quantize,
)

pytestmark = pytest.mark.gpu

SIZES = [(1, 64), (3, 576), (5, 1536), (130, 4096), (7, 14336), (2, 28672), (3, 49152)]
DTYPES = [torch.float16, torch.bfloat16]


def on_cpu(x: QuantizedActivation) -> QuantizedActivation:
    return QuantizedActivation(*(tensor.cpu() for tensor in vars(x).values()))


def assert_quantized_close(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    """Float32 arithmetic may move a value over a rounding boundary, by one code and rarely."""
    found = on_cpu(found)
    torch.testing.assert_close(found.scale, expected.scale, rtol=2e-6, atol=0)
    steps = (found.codes.int() - expected.codes.int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-3
    assert torch.equal(found.row_sum, found.codes.sum(dim=1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_quantize_gives_the_reference_bits(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(size) * torch.rand(size[0], 1) * 100).to(dtype)
    x[0, ::3] = 0
    found, expected = on_cpu(quantize_per_token(x.cuda())), quantize_per_token(x)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name


def test_quantize_of_zeros_and_ties() -> None:
    x = torch.zeros(2, 64, dtype=torch.float16)
    x[1] = torch.arange(64) - 31.5  # with amax 127 every value lies between two codes
    x[1, 0] = 127
    found, expected = on_cpu(quantize_per_token(x.cuda())), quantize_per_token(x)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


def test_quantize_of_values_below_all_normal_floats() -> None:
    x = (torch.randn(8, 64) * 1e-38).bfloat16()
    found, expected = on_cpu(quantize_per_token(x.cuda())), quantize_per_token(x)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(size: tuple[int, int], dtype: torch.dtype, with_residual: bool) -> None:
    x = torch.randn(size).to(dtype)
    residual = (torch.randn(size) * 5).to(dtype) if with_residual else None
    weight = torch.rand(size[1]) + 0.5
    for norm_weight in (weight, weight.to(dtype)):
        moved = None if residual is None else residual.cuda()
        normed, total = rms_norm(x.cuda(), norm_weight.cuda(), 1e-5, moved)
        expected, expected_total = rms_norm(x, norm_weight, 1e-5, residual)
        assert torch.equal(total.cpu(), expected_total)
        rtol = torch.finfo(dtype).eps * 1.01
        torch.testing.assert_close(normed.cpu(), expected, rtol=rtol, atol=1e-6)
        codes, total = rms_norm_quantize(x.cuda(), norm_weight.cuda(), 1e-5, moved)
        assert torch.equal(total.cpu(), expected_total)
        assert_quantized_close(codes, rms_norm_quantize(x, norm_weight, 1e-5, residual)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_silu_mul_quantize(size: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(size[0], 2 * size[1]) * 3).to(dtype)
    gate_up[0, 0] = -200  # where exp overflows
    assert_quantized_close(silu_mul_quantize(gate_up.cuda()), silu_mul_quantize(gate_up))


def test_producers_refuse_what_they_do_not_take() -> None:
    x = torch.randn(4, 64, device="cuda")
    with pytest.raises(OpError, match="float32 is not served"):
        quantize_per_token(x)
    with pytest.raises(OpError, match="multiple of 8"):
        quantize_per_token(x.half()[:, :60].contiguous())
    with pytest.raises(OpError, match="contiguous"):
        quantize_per_token(torch.randn(64, 64, device="cuda").half().T)
