"""`round_columns` on a GPU: one launch, a thread per row of the weight."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qserve.kernels.jit import Kernel
from qserve.kernels.round_columns import BLOCK_COLUMNS

_THREADS = 128


def round_columns(
    block: Tensor, step: Tensor, zero: Tensor, top: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """See `round_columns.round_columns`."""
    codes, errors, rows = torch.empty_like(step), torch.empty_like(step), block.shape[1]
    tensors = [tensor.contiguous() for tensor in (block, step, zero, top, factor)]
    grid = (-(-rows // _THREADS),)
    round_columns_kernel()(block.device, grid, (*tensors, codes, errors, rows))
    return codes, errors


@cache
def round_columns_kernel() -> Kernel:
    """The one variant."""
    return Kernel(
        "round_columns.cu",
        "round_columns",
        parameters="(7Pi)",
        threads=_THREADS,
        shared_bytes=4 * BLOCK_COLUMNS**2,
        constants={"COLUMNS": BLOCK_COLUMNS},
    )
