"""A quantized linear, and the residual add, RMSNorm and quantization after it."""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.fused import rms_norm_quantize
from qserve.kernels.gemm import PreparedWeight, quantized_linear


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
    On a GPU one launch where that is no slower than two, with the same bits.
    """
    if x.codes.is_cuda:
        from qserve.kernels import gemm_norm_cuda

        if gemm_norm_cuda.fuses(x, weight):
            return gemm_norm_cuda.linear_rms_norm_quantize(
                x, weight, bias, out_dtype, norm_weight, eps, residual
            )
    out = quantized_linear(x, weight, bias, out_dtype)
    return rms_norm_quantize(out, norm_weight, eps, residual)
