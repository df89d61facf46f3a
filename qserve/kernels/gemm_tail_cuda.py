"""When a GEMM takes the producer after it into its launch, and that launch."""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.gemm import PreparedWeight
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_variants import Tail

MOST_TOKENS = 64
"""Above, two launches are as fast, see docs/kernels.md."""

MOST_NORM_COLUMNS = 6144
"""Longer rows would cost the multiply's registers."""


def fuses(tail: Tail, weight: PreparedWeight, tokens: int) -> bool:
    """Whether one launch is no slower than two; needs the Hopper kernel for few tokens."""
    if not isinstance(weight, CudaWeight) or not 0 < tokens <= MOST_TOKENS or tail.columns % 8:
        return False
    fits = not tail.is_norm or tail.columns <= MOST_NORM_COLUMNS
    return fits and weight.tile_for(tokens).kind == "small"


def launch(
    tail: Tail,
    x: QuantizedActivation,
    weight: PreparedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fields: tuple[object, ...],
) -> QuantizedActivation:
    """One launch; fields: of the tail's struct in csrc/tail.cuh, before its outputs."""
    assert isinstance(weight, CudaWeight)
    out = QuantizedActivation.empty(len(x.codes), tail.columns, x.codes.device)
    tile = weight.tile_for(len(x.codes))
    arguments = (*fields, out.codes, out.scale, out.row_sum)
    weight.apply_tile(x, bias, out_dtype, tile, tail, arguments)
    return out
