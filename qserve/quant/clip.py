"""Where to put a weight's grid: the spans that lose least, each input weighted by how loud it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats.layout import CODE_MAX, PROTECTIVE_RANGE
from qserve.formats.weight import ChannelGrid, GroupGrid, WeightGrid, fit_grid

_CLIP_RATIOS = tuple(1 - step / 100 for step in range(0, 60, 2))
_SCALE_STEPS = (1, 0, -1, -2, -3, -4)
_ROW_BLOCK = 2**18


def search_grid(weight: Tensor, group_size: int, importance: Tensor) -> WeightGrid:
    """The grid of weight [N, K] that loses least, importance [K] being the inputs' mean squares."""
    if group_size == -1:
        return _search_ratio(weight, importance)
    rows = max(1, _ROW_BLOCK // weight.shape[1])
    grids = [_search_groups(block, group_size, importance) for block in weight.split(rows)]
    return GroupGrid(
        torch.cat([grid.scale for grid in grids]),
        torch.cat([grid.group_scale for grid in grids]),
        torch.cat([grid.group_zero for grid in grids]),
        group_size,
    )


def _search_ratio(weight: Tensor, importance: Tensor) -> ChannelGrid:
    """The best common ratio by which each row's range is shrunk."""
    best = torch.ones(len(weight), device=weight.device)
    lowest = torch.full_like(best, torch.inf)
    for ratio in _CLIP_RATIOS:
        grid = ChannelGrid.fit(weight, ratio)
        loss = (grid.dequantize(grid.quantize(weight)) - weight).square() @ importance
        best = torch.where(loss < lowest, ratio, best)
        lowest = torch.minimum(loss, lowest)
    return ChannelGrid.fit(weight, best)


def _search_groups(weight: Tensor, group_size: int, importance: Tensor) -> GroupGrid:
    """The best level-2 scale and zero of each group, level 1 spanning the row."""
    grid = fit_grid(weight, group_size)
    assert isinstance(grid, GroupGrid)
    level1 = (weight / grid.scale.float()[:, None]).unflatten(1, (-1, group_size))
    loudness = importance.reshape(-1, group_size)
    best = _Candidate(torch.ones_like(level1[..., 0]), torch.zeros_like(level1[..., 0]))
    lowest = torch.full_like(level1[..., 0], torch.inf)
    for candidate in _candidates(level1):
        loss = candidate.loss(level1, loudness)
        better = loss < lowest
        best = best.replaced(better, candidate)
        lowest = torch.minimum(loss, lowest)
    return GroupGrid(grid.scale, best.scale.to(torch.uint8), best.zero.to(torch.uint8), group_size)


@dataclass(frozen=True)
class _Candidate:
    """Level-2 scales and zeros, float32 [N, K/g] both."""

    scale: Tensor
    zero: Tensor

    def loss(self, level1: Tensor, loudness: Tensor) -> Tensor:
        """[N, K/g]: the weighted squared error of rounding level1 [N, K/g, g]; infinite if not valid."""
        scale, zero = self.scale[..., None], self.zero[..., None]
        top = torch.floor(127 / self.scale + self.zero).clamp_(max=CODE_MAX)[..., None]
        codes = torch.round(level1 / scale + zero).clamp_(min=0).minimum(top)
        error = codes.sub_(zero).mul_(scale).sub_(level1)
        loss = (error.square_() * loudness).sum(dim=-1)
        return loss.masked_fill(self.zero * self.scale > 127, torch.inf)

    def replaced(self, where: Tensor, other: _Candidate) -> _Candidate:
        return _Candidate(
            torch.where(where, other.scale, self.scale), torch.where(where, other.zero, self.zero)
        )


def _candidates(level1: Tensor) -> Iterator[_Candidate]:
    """Scales about the one that spans the group, with the zeros that centre or that reach its minimum."""
    low = level1.amin(dim=-1).clamp(-PROTECTIVE_RANGE, 0)
    high = level1.amax(dim=-1).clamp(0, PROTECTIVE_RANGE)
    spanning = torch.round((high - low) / CODE_MAX)
    for step in _SCALE_STEPS:
        scale = (spanning + step).clamp(1, 2 * PROTECTIVE_RANGE // CODE_MAX + 1)
        centre = CODE_MAX / 2 - (low + high) / 2 / scale
        for zero in (torch.floor(centre), torch.ceil(centre), torch.round(-low / scale)):
            yield _Candidate(scale, zero.clamp(0, CODE_MAX))
