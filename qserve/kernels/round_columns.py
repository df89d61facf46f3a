"""The inner loop of GPTQ (arXiv 2210.17323): a block of columns, rounded one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.kernels.op import Contract

BLOCK_COLUMNS = 64
"""Columns that are rounded between two updates of all that follow."""


def round_columns(
    block: Tensor, step: Tensor, zero: Tensor, top: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Round the columns of a weight, which are the rows of `block`, to w = (q - zero) * step.

    block, step, zero, top: float32 [64, N], 0 <= q <= top. factor: float32 [64, 64], the upper
    triangular U of U^T U = H^-1, by which a column's error moves those behind it.
    Returns (codes, errors), float32 [64, N] both: a column's error over its diagonal of U.
    """
    contract = Contract("round_columns")
    for name, tensor in (("block", block), ("step", step), ("zero", zero), ("top", top)):
        contract.check(name, tensor, (BLOCK_COLUMNS, "N"), torch.float32)
    contract.check("factor", factor, (BLOCK_COLUMNS, BLOCK_COLUMNS), torch.float32)
    if block.is_cuda:
        from qserve.kernels import round_columns_cuda

        return round_columns_cuda.round_columns(block, step, zero, top, factor)
    return _reference(block, step, zero, top, factor)


def _reference(
    block: Tensor, step: Tensor, zero: Tensor, top: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    values, codes, errors = block.clone(), torch.empty_like(block), torch.empty_like(block)
    for i in range(len(values)):
        nearest = torch.round(values[i] / step[i] + zero[i])
        codes[i] = nearest.clamp_(min=0).minimum(top[i])
        errors[i] = (values[i] - (codes[i] - zero[i]) * step[i]) / factor[i, i]
        values[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors
