"""Producers: the ops that make a linear's int8 input, each one launch on a GPU.

Sums run in float64 on the CPU and round once, so that a row's result does not depend on the rows
beside it. RMSNorm is RMSNorm: no mean is subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.kernels.op import FLOAT_DTYPES, Contract


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual.

    x: float [M, H]; residual: like x, or None. weight: float [H].
    Returns (normed [M, H] in x's dtype, x + residual in x's dtype).
    """
    _check_norm("rms_norm", x, weight, residual)
    if x.is_cuda:
        from qserve.kernels import producers_cuda

        return producers_cuda.rms_norm(x, weight, eps, residual)
    total = x if residual is None else x + residual
    return _normalize(total, weight, eps).to(x.dtype), total


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[QuantizedActivation, Tensor]:
    """`rms_norm`, then per-token int8 from the float32 result, which is not rounded in between.

    Returns (QuantizedActivation of [M, H], x + residual in x's dtype).
    """
    _check_norm("rms_norm_quantize", x, weight, residual)
    if x.is_cuda:
        from qserve.kernels import producers_cuda

        return producers_cuda.rms_norm_quantize(x, weight, eps, residual)
    total = x if residual is None else x + residual
    return quantize_activation(_normalize(total, weight, eps)), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up. gate_up: float [M, 2I], gate first. Returns [M, I] in its dtype."""
    Contract("silu_mul").check("gate_up", gate_up, ("M", "2I"), *FLOAT_DTYPES)
    if gate_up.is_cuda:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return _silu_mul(gate_up).to(gate_up.dtype)


def silu_mul_quantize(gate_up: Tensor) -> QuantizedActivation:
    """`silu_mul`, then per-token int8 from the float32 result, which is not rounded in between.

    gate_up: float [M, 2I], gate first. Returns the QuantizedActivation of [M, I].
    """
    Contract("silu_mul_quantize").check("gate_up", gate_up, ("M", "2I"), *FLOAT_DTYPES)
    if gate_up.is_cuda:
        from qserve.kernels import producers_cuda

        return producers_cuda.silu_mul_quantize(gate_up)
    return quantize_activation(_silu_mul(gate_up))


def quantize_per_token(x: Tensor) -> QuantizedActivation:
    """Per-token int8 of x, float [M, K]; the rule is `formats.activation.quantize_activation`."""
    Contract("quantize_per_token").check("x", x, ("M", "K"), *FLOAT_DTYPES)
    if x.is_cuda:
        from qserve.kernels import producers_cuda

        return producers_cuda.quantize_per_token(x)
    return quantize_activation(x)


def _normalize(total: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = total.double()
    inverse_rms = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * inverse_rms).float() * weight.float()


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).float()


def _check_norm(op: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    contract = Contract(op)
    contract.check("x", x, ("M", "H"), *FLOAT_DTYPES)
    contract.check("weight", weight, ("H",), *FLOAT_DTYPES)
    if residual is not None:
        contract.check("residual", residual, ("M", "H"), x.dtype)
