"""From a weight and the second moment of its inputs to codes on a fixed grid.

Every method lowers tr(E H E^T) with E = dequantized - weight and H = X^T X over calibration inputs:
round-to-nearest ignores H, GPTQ (arXiv 2210.17323) passes each column's error on to those not yet
rounded, coordinate descent (arXiv 2309.01885) then revisits single codes until few change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats.layout import CODE_MAX
from qserve.formats.weight import ChannelGrid, WeightGrid

_BLOCK = 64


@dataclass(frozen=True)
class _Columns:
    """A grid by column: w = (q - zero) * step, 0 <= q <= top; float32 [K, N] each."""

    step: Tensor
    zero: Tensor
    top: Tensor

    @classmethod
    def of(cls, grid: WeightGrid, order: Tensor) -> _Columns:
        """The columns `order` of a grid."""
        if isinstance(grid, ChannelGrid):
            step, zero = grid.scale.float()[:, None], grid.zero.float()[:, None]
            top, group = torch.full_like(zero, CODE_MAX), torch.zeros_like(order)
        else:
            step = grid.scale.float()[:, None] * grid.group_scale.float()
            zero, top = grid.group_zero.float(), grid.max_code.float()
            group = order // grid.group_size
        return cls(*(values.T[group].contiguous() for values in (step, zero, top)))

    def nearest(self, column: int, values: Tensor) -> Tensor:
        """Codes float32 [N] of one column's values [N]."""
        codes = torch.round(values / self.step[column] + self.zero[column])
        return codes.clamp_(min=0).minimum(self.top[column])

    def dequantize(self, column: int, codes: Tensor) -> Tensor:
        return (codes - self.zero[column]) * self.step[column]


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [K, K] plus `damping` times its mean diagonal; inputs never seen count as 1."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return result


def error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> Tensor:
    """The objective of each row, [N]."""
    difference = (dequantized - weight).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum(dim=1)


def gptq(weight: Tensor, grid: WeightGrid, hessian: Tensor) -> Tensor:
    """Codes u8 [N, K] of weight [N, K]; hessian [K, K] is damped. Columns by falling diagonal."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    columns = _Columns.of(grid, order)
    factor = _inverse_factor(hessian[order][:, order]).to(weight.dtype)
    remaining = weight.T[order].contiguous()
    codes = torch.empty_like(remaining)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        errors = _gptq_block(remaining[start:stop], codes[start:stop], columns, factor, start)
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
    return codes[torch.argsort(order)].T.to(torch.uint8).contiguous()


def _gptq_block(
    block: Tensor, codes: Tensor, columns: _Columns, factor: Tensor, start: int
) -> Tensor:
    """Round the rows of block [B, N] into `codes` in turn; returns their scaled errors [B, N]."""
    errors = torch.empty_like(block)
    for row in range(len(block)):
        column = start + row
        codes[row] = columns.nearest(column, block[row])
        rounding = block[row] - columns.dequantize(column, codes[row])
        errors[row] = rounding / factor[column, column]
        following = factor[column, column + 1 : start + len(block)]
        block[row + 1 :].addr_(following, errors[row], alpha=-1)
    return errors


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = inverse of `hessian`, in float64."""
    lower = torch.linalg.cholesky(hessian.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def coordinate_descent(
    weight: Tensor, grid: WeightGrid, hessian: Tensor, codes: Tensor, sweeps: int
) -> Tensor:
    """Codes u8 [N, K] whose error is at most that of `codes`: each in turn set to its best."""
    order = torch.arange(weight.shape[1], device=weight.device)
    columns = _Columns.of(grid, order)
    current = codes.T.float().contiguous()
    difference = (current - columns.zero) * columns.step - weight.T
    metric = hessian.to(weight.dtype)
    for _ in range(sweeps):
        for start in range(0, len(order), _BLOCK):
            _descend_block(current, difference, columns, metric, start)
    return current.T.to(torch.uint8).contiguous()


def _descend_block(
    codes: Tensor, difference: Tensor, columns: _Columns, metric: Tensor, start: int
) -> None:
    block = slice(start, min(start + _BLOCK, len(codes)))
    gradient = metric[block] @ difference
    inner = metric[block, block]
    for row, column in enumerate(range(block.start, block.stop)):
        now = columns.dequantize(column, codes[column])
        codes[column] = columns.nearest(column, now - gradient[row] / inner[row, row])
        change = columns.dequantize(column, codes[column]) - now
        difference[column] += change
        gradient.addr_(inner[row], change)
