"""Activations: int8, symmetric, one scale per token. The rounding rule kernels share bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats.layout import ACTIVATION_MAX

ROOM = 256
"""Rows: a GEMM whose last tile is not full reads on behind the codes, if it may, which is faster."""


@dataclass(frozen=True)
class QuantizedActivation:
    """`x ~ codes * scale[:, None]`.

    codes: int8 [M, K], within +-127. scale: float32 [M].
    row_sum: int32 [M], the sum of each row's codes, which turns zero points into one epilogue term.
    """

    codes: Tensor
    scale: Tensor
    row_sum: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> QuantizedActivation:
        """Room for [rows, columns], not initialised; behind the codes, up to a multiple of ROOM."""
        codes = torch.empty(rows + -rows % ROOM, columns, dtype=torch.int8, device=device)
        return cls(
            codes=codes[:rows],
            scale=torch.empty(rows, dtype=torch.float32, device=device),
            row_sum=torch.empty(rows, dtype=torch.int32, device=device),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[M, K] in `dtype`."""
        return (self.codes.to(torch.float32) * self.scale[:, None]).to(dtype)


def quantize_activation(x: Tensor) -> QuantizedActivation:
    """Quantize x [M, K] (any float dtype) per token.

    In float32: scale = amax / 127, inverse = 127 / amax (at most the largest float),
    code = round_half_to_even(x * inverse). Not finite inputs have no meaning here.
    """
    values = x.to(torch.float32)
    amax = values.abs().amax(dim=-1)
    limit = torch.full_like(amax, ACTIVATION_MAX)  # torch divides by a number as it likes
    inverse = (limit / amax).clamp_(max=torch.finfo(torch.float32).max)
    codes = torch.round(values * inverse[:, None])
    return QuantizedActivation(
        codes=codes.to(torch.int8),
        scale=amax / limit,
        row_sum=codes.sum(dim=-1, dtype=torch.float64).to(torch.int32),
    )
