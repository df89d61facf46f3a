"""From a weight and the second moment of its inputs to codes on a fixed grid.

Every method lowers tr(E H E^T) with E = dequantized - weight and H = X^T X over calibration inputs:
round-to-nearest ignores H, GPTQ (arXiv 2210.17323) passes each column's error on to those that are
not rounded yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats.grid import ChannelGrid, WeightGrid
from qserve.formats.layout import CODE_MAX
from qserve.kernels.round_columns import BLOCK_COLUMNS, round_columns


@dataclass(frozen=True)
class _Columns:
    """A grid by column: w = (q - zero) * step, 0 <= q <= top; float32 [G, N] each.

    group: i64 [K], which of these a column has.
    """

    step: Tensor
    zero: Tensor
    top: Tensor
    group: Tensor

    @classmethod
    def of(cls, grid: WeightGrid, order: Tensor) -> _Columns:
        """The columns `order` of a grid."""
        if isinstance(grid, ChannelGrid):
            step, zero = grid.scale.float()[:, None], grid.zero.float()[:, None]
            return cls(step.T, zero.T, torch.full_like(zero, CODE_MAX).T, torch.zeros_like(order))
        step = grid.scale.float()[:, None] * grid.group_scale.float()
        zero, top = grid.group_zero.float(), grid.max_code.float()
        return cls(step.T, zero.T, top.T, order // grid.group_size)

    def at(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Step, zero and top of some columns, [n, N] each."""
        group = self.group[columns]
        return self.step[group], self.zero[group], self.top[group]


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear's inputs over tokens, float64 [K, K]: X served, D exact - served.

    hessian: X^T X. cross: D^T X, if wanted.
    """

    hessian: Tensor
    cross: Tensor | None

    @classmethod
    def of(
        cls, batches: Iterable[tuple[Tensor, Tensor, Tensor | None]], with_cross: bool = True
    ) -> Moments:
        """Of batches (exact [T, K], served [T, K], residual). Where the output is added to a residual
        stream [T, H], tokens count by the inverse of its mean square: the norms that follow see
        errors relative to it."""
        hessian: Tensor | None = None
        cross: Tensor | None = None
        for exact, served, residual in batches:
            weighted = served
            if residual is not None:
                weighted = served / residual.square().mean(dim=1, keepdim=True)
            hessian = _added(hessian, weighted.T @ served)
            if with_cross:
                cross = _added(cross, (exact - served).T @ weighted)
        assert hessian is not None, "there must be a batch"
        return cls(hessian, cross)


def _added(total: Tensor | None, moment: Tensor) -> Tensor:
    """Float64 sums of float32 products of a batch."""
    return moment.double() if total is None else total.add_(moment)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [K, K] plus `damping` times its mean diagonal; inputs never seen count as 1."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return result


@dataclass(frozen=True)
class InverseFactor:
    """U^T U = the inverse of a damped second moment, both of its dimensions in `order`.

    order: i64 [K], falling diagonal. factor: float64 [K, K], upper triangular.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> InverseFactor:
        """U is the inverse of R, hessian = R R^T, whose flip is the factor of hessian's flip."""
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        backward = order.flip(0)
        root = torch.linalg.cholesky(hessian[backward[:, None], backward]).flip(0, 1)
        identity = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
        return cls(order, torch.linalg.solve_triangular(root, identity, upper=True))

    def solve(self, rows: Tensor) -> Tensor:
        """rows [N, K] times the inverse."""
        product: Tensor = rows[:, self.order] @ self.factor.T @ self.factor
        return product[:, torch.argsort(self.order)]


def propagated(weight: Tensor, cross: Tensor, inverse: InverseFactor, strength: float) -> Tensor:
    """The weight [N, K] that makes up, by `strength`, for what the served inputs lack.

    At strength 1 it is the least-squares fit of the exact outputs from the served inputs. cross: of
    their `Moments`; inverse: of the damped second moment. Sources: QEP (arXiv 2504.09629), GPTAQ
    (arXiv 2504.02692).
    """
    correction = inverse.solve(weight.double() @ cross)
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


def gptq(weight: Tensor, grid: WeightGrid, inverse: InverseFactor) -> Tensor:
    """Codes u8 [N, K] of weight [N, K], its columns rounded in the order of `inverse`."""
    columns = _Columns.of(grid, inverse.order)
    factor = inverse.factor.float()
    remaining = weight.T[inverse.order].float()
    codes = torch.empty_like(remaining, dtype=torch.uint8)
    for start in range(0, len(remaining), BLOCK_COLUMNS):
        block, later = slice(start, start + BLOCK_COLUMNS), slice(start + BLOCK_COLUMNS, None)
        rounded, errors = round_columns(
            remaining[block], *columns.at(block), factor[block, block].contiguous()
        )
        codes[block] = rounded
        remaining[later].addmm_(factor[block, later].T, errors, alpha=-1)
    return codes[torch.argsort(inverse.order)].T.contiguous()
