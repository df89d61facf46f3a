"""A quantized linear and the producer after it, in one launch where a GPU is the faster for it.

Each op here is two others in a row, and gives their results bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.fused import rms_norm_quantize, silu_mul_quantize
from qserve.kernels.gemm import PreparedWeight, check_linear, quantized_linear
from qserve.kernels.gemm_variants import Tail


def linear_rms_norm_quantize(
    x: QuantizedActivation,
    weight: PreparedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    norm_weight: Tensor,
    eps: float,
    residual: Tensor,
) -> tuple[QuantizedActivation, Tensor]:
    """`rms_norm_quantize(quantized_linear(x, weight, bias, out_dtype), norm_weight, eps, residual)`.

    x: [M, K]; weight: [N, K]; norm_weight: [N], `out_dtype` or float32; residual: [M, N] `out_dtype`.
    """
    columns = weight.shape[0]
    tail = Tail("rms_norm_quantize", columns, norm_weight.dtype == torch.float32)
    if not _fuses(tail, x, weight):
        out = quantized_linear(x, weight, bias, out_dtype)
        return rms_norm_quantize(out, norm_weight, eps, residual)
    contract = check_linear(x, weight.shape, bias, out_dtype)
    contract.check("norm_weight", norm_weight, (columns,), torch.float32, out_dtype)
    contract.check("residual", residual, ("M", columns), out_dtype)
    contract.require(residual.is_contiguous(), "residual must be contiguous")
    total = torch.empty_like(residual)
    fields = (residual, norm_weight, total, eps)
    return _launch(tail, x, weight, bias, out_dtype, fields), total


def linear_silu_mul_quantize(
    x: QuantizedActivation, weight: PreparedWeight, bias: Tensor | None, out_dtype: torch.dtype
) -> QuantizedActivation:
    """`silu_mul_quantize(quantized_linear(x, weight, bias, out_dtype))`; weight: gate, then up."""
    tail = Tail("silu_mul_quantize", weight.shape[0] // 2)
    if not _fuses(tail, x, weight):
        return silu_mul_quantize(quantized_linear(x, weight, bias, out_dtype))
    check_linear(x, weight.shape, bias, out_dtype)
    return _launch(tail, x, weight, bias, out_dtype, ())


def _fuses(tail: Tail, x: QuantizedActivation, weight: PreparedWeight) -> bool:
    if not x.codes.is_cuda:
        return False
    from qserve.kernels.gemm_tail_cuda import fuses

    return fuses(tail, weight, len(x.codes))


def _launch(
    tail: Tail,
    x: QuantizedActivation,
    weight: PreparedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fields: tuple[object, ...],
) -> QuantizedActivation:
    from qserve.kernels.gemm_tail_cuda import launch

    return launch(tail, x, weight, bias, out_dtype, fields)
