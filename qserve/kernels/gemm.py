"""Quantized linears: int8 activations times 4-bit or 8-bit weights, exact in integers.

The contract of all implementations, bit for bit:

    acc[m, n]  = sum_k codes[m, k] * integer[n, k]                 int32, exact
    acc[m, n] -= row_sum[m] * zero[n]                              per-channel W4, integer zeros
    out[m, n]  = (float32(acc) * weight_scale[n]) * scale[m] + bias[n]   float32, rounded once to out

where `integer` is q (0..15) per channel, int8(q * s2 + z2) per group, or the int8 weight.
A per-channel file whose zero points are not integers takes them off in floating point:
`(float32(acc) - row_sum * zero[n]) * ...`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.formats.layout import ACTIVATION_MAX
from qserve.formats.weight import QuantizedWeight, W4Weight
from qserve.kernels.op import FLOAT_DTYPES, Contract

EXACT_CHUNK = 2**24 // (ACTIVATION_MAX * 128) // 8 * 8
"""Input channels that float32 sums exactly in any order: every partial sum stays below 2^24."""


class PreparedWeight(Protocol):
    """A weight repacked for one device's kernel."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    def apply(self, x: QuantizedActivation, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """[M, N] in `out_dtype`."""


def prepare_weight(weight: QuantizedWeight, device: torch.device | str) -> PreparedWeight:
    """Repack `weight` for the kernel of `device`, once, at load."""
    device = torch.device(device)
    if device.type == "cpu":
        return ExactFloatWeight.prepare(weight)
    from qserve.kernels.gemm_cuda import CudaWeight

    return CudaWeight.prepare(weight, device)


def quantized_linear(
    x: QuantizedActivation,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[M, N] in `out_dtype` (float16, bfloat16; float32 on the CPU), from codes int8 [M, K].

    weight: prepared for the activations' device. bias: [N], any float dtype.
    Raises OpError on shapes or dtypes that disagree.
    """
    check_linear(x, weight.shape, bias, out_dtype)
    return weight.apply(x, bias, out_dtype)


def reference_linear(
    x: QuantizedActivation,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The specification of `quantized_linear`: int64 arithmetic on the packed bytes."""
    check_linear(x, weight.shape, bias, out_dtype)
    accumulator = x.codes.long() @ weight.integers().long().T
    return _epilogue(accumulator, x, _Epilogue.of(weight), bias, out_dtype)


@dataclass(frozen=True)
class ExactFloatWeight:
    """The CPU's form: integers as float32 [K, N], multiplied at float speed, exactly.

    The sum over K is cut into chunks whose partial sums float32 holds exactly; the chunks are added
    in float64. The result equals int64 arithmetic whatever the batch size.
    """

    integers: Tensor
    epilogue: _Epilogue

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> ExactFloatWeight:
        """From the checkpoint's tensors."""
        return cls(weight.integers().float().T.contiguous(), _Epilogue.of(weight))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.integers.shape[1], self.integers.shape[0]

    def apply(self, x: QuantizedActivation, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """[M, N] in `out_dtype`."""
        codes = x.codes.float()
        chunks = zip(codes.split(EXACT_CHUNK, 1), self.integers.split(EXACT_CHUNK), strict=True)
        partial_sums = [chunk @ rows for chunk, rows in chunks]
        accumulator = partial_sums[0]
        if len(partial_sums) > 1:
            accumulator = torch.stack(partial_sums).sum(0, dtype=torch.float64)
        return _epilogue(accumulator, x, self.epilogue, bias, out_dtype)


@dataclass(frozen=True)
class _Epilogue:
    """weight_scale float32 [N]; zero float64 [N] of per-channel W4, else None."""

    weight_scale: Tensor
    zero: Tensor | None

    @classmethod
    def of(cls, weight: QuantizedWeight) -> _Epilogue:
        if not isinstance(weight, W4Weight):
            return cls(weight.dequant_scale.float(), None)
        zero = weight.zeros().double() if weight.group_size == -1 else None
        return cls(weight.s1_scales.float(), zero)


def _epilogue(
    accumulator: Tensor,
    x: QuantizedActivation,
    epilogue: _Epilogue,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if epilogue.zero is not None:
        accumulator = accumulator.double() - x.row_sum.double()[:, None] * epilogue.zero
    out = accumulator.float() * epilogue.weight_scale * x.scale[:, None]
    return (out if bias is None else out + bias.float()).to(out_dtype)


def check_linear(
    x: QuantizedActivation, shape: tuple[int, int], bias: Tensor | None, out_dtype: torch.dtype
) -> Contract:
    """Raise OpError unless x can be multiplied by a weight of `shape`, (N, K)."""
    contract = Contract("quantized_linear")
    contract.check("codes", x.codes, ("M", shape[1]), torch.int8)
    contract.check("scale", x.scale, ("M",), torch.float32)
    contract.check("row_sum", x.row_sum, ("M",), torch.int32)
    if bias is not None:
        contract.check("bias", bias, (shape[0],), *FLOAT_DTYPES)
    contract.require(out_dtype in FLOAT_DTYPES, f"out_dtype must be a float dtype, not {out_dtype}")
    return contract
