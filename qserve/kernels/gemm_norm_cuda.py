"""A GEMM that goes on with the norm after it, in one launch; the contract is in `gemm_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.gemm import PreparedWeight, check_linear
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_variants import Norm
from qserve.kernels.tiles import Tile

TOKENS = range(33, 65)
"""Batches for which one launch was measured to be the faster; see docs/kernels.md."""

COLUMNS = range(2048, 6145)
"""Of the norm: blocks meet for too little work in shorter rows, longer ones cost registers."""


def fuses(x: QuantizedActivation, weight: PreparedWeight) -> bool:
    """Whether one launch is faster than two; needs the Hopper kernel for few tokens."""
    tokens, columns = x.codes.shape[0], weight.shape[0]
    if tokens not in TOKENS or columns not in COLUMNS:
        return False
    return isinstance(weight, CudaWeight) and weight.tile_for(tokens).kind == "small"


def linear_rms_norm_quantize(
    x: QuantizedActivation,
    weight: PreparedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    norm_weight: Tensor,
    eps: float,
    residual: Tensor,
    tile: Tile | None = None,
) -> tuple[QuantizedActivation, Tensor]:
    """See `gemm_norm`; tile: not the one that is the fastest for the GEMM alone."""
    assert isinstance(weight, CudaWeight)
    contract = check_linear(x, weight.shape, bias, out_dtype)
    contract.check("norm_weight", norm_weight, (weight.shape[0],), torch.float32, out_dtype)
    contract.check("residual", residual, ("M", weight.shape[0]), out_dtype)
    contract.require(residual.is_contiguous(), "residual must be contiguous")
    tokens, columns = residual.shape
    total = torch.empty_like(residual)
    out = QuantizedActivation.empty(tokens, columns, residual.device)
    norm = Norm(columns, norm_weight.dtype == torch.float32)
    fields = (residual, norm_weight, total, eps, out.codes, out.scale, out.row_sum)
    tile = tile or weight.tile_for(tokens)
    weight.apply_tile(x, bias, out_dtype, tile, norm, fields)
    return out, total
