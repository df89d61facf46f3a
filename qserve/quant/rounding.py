"""From a weight and the second moment of its inputs to codes on a fixed grid.

Every method lowers tr(E H E^T) with E = dequantized - weight and H = X^T X over calibration inputs:
round-to-nearest ignores H, GPTQ (arXiv 2210.17323) passes each column's error on to those that are
not rounded yet.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear's inputs over tokens, float64 [K, K]: X served, D exact - served.

    hessian: X^T X. cross: D^T X.
    """

    hessian: Tensor
    cross: Tensor

    @classmethod
    def of(
        cls,
        exact: Sequence[Tensor],
        served: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
    ) -> Moments:
        """Of batches [T, K]. Where the output is added to a residual stream [T, H], tokens count by
        the inverse of its mean square: the norms that follow see errors relative to it."""
        size = served[0].shape[1]
        hessian = torch.zeros(size, size, dtype=torch.float64, device=served[0].device)
        cross = torch.zeros_like(hessian)
        for x, y, residual in zip(exact, served, residuals, strict=True):
            weighted = y if residual is None else y / residual.square().mean(dim=1, keepdim=True)
            hessian += weighted.T @ y
            cross += (x - y).T @ weighted
        return cls(hessian, cross)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [K, K] plus `damping` times its mean diagonal; inputs never seen count as 1."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return result


def propagated(weight: Tensor, moments: Moments, hessian: Tensor, strength: float) -> Tensor:
    """The weight [N, K] that makes up, by `strength`, for what the served inputs lack.

    At strength 1 it is the least-squares fit of the exact outputs from the served inputs; hessian
    is the damped one.
    """
    if strength == 0:
        return weight
    lacking = weight.double() @ moments.cross
    correction = torch.cholesky_solve(lacking.T, torch.linalg.cholesky(hessian)).T
    return weight + strength * correction.to(weight.dtype)


def error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> Tensor:
    """The objective of each row, [N]."""
    difference = (dequantized - weight).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum(dim=1)


def no_worse(
    codes: Tensor, nearest: Tensor, weight: Tensor, grid: WeightGrid, hessian: Tensor
) -> Tensor:
    """Of each row [K] the `codes`, or the `nearest` where those have the lower error."""
    metric = hessian.to(weight.dtype)
    errors = [error(weight, grid.dequantize(each), metric) for each in (codes, nearest)]
    return torch.where((errors[0] <= errors[1])[:, None], codes, nearest)


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
    """Upper triangular U with U^T U = inverse of `hessian`: the inverse of R, hessian = R R^T."""
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return inverse
