"""Where to put a weight's grid: the spans that lose least, by what they do to a linear's output.

The loss of a group is E M E^T, E its rounding error and M the second moment of its inputs: whole, or
its diagonal alone, which is cheaper and leaves the rest to GPTQ. QoQ (arXiv 2405.04532) clips
queries and keys by what they do to attention's output instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qserve.formats.grid import ChannelGrid, GroupGrid, WeightGrid, fit_grid
from qserve.formats.layout import CODE_MAX, PROTECTIVE_RANGE

CLIP_RATIOS = tuple(1 - step / 100 for step in range(0, 60, 2))
_SCALE_STEPS = (1, 0, -1, -2, -3, -4)
_ROW_BLOCK = {"cpu": 2**18, "cuda": 2**24}
"""Weights searched at once: few enough for a CPU's cache, many enough for a GPU's launches."""


def search_grid(weight: Tensor, group_size: int, moments: Tensor) -> WeightGrid:
    """The grid of weight [N, K] that loses least.

    moments: of the inputs, [K] mean squares or [K, K], whose blocks on the diagonal count per group.
    """
    if group_size == -1:
        return _search_ratio(weight, moments)
    metric = _by_group(moments, group_size)
    rows = max(1, _ROW_BLOCK[weight.device.type] // weight.shape[1])
    return join_grids([_search_groups(block, group_size, metric) for block in weight.split(rows)])


def search_head_ratio(
    weight: Tensor, group_size: int, heads: int, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """By which ratio [heads] to shrink the rows of each head of weight [N, K].

    loss: of attention's output, [heads], given the weight rounded to the nearest codes.
    """
    best = torch.ones(heads, device=weight.device)
    lowest = torch.full_like(best, torch.inf)
    for ratio in CLIP_RATIOS:
        grid = fit_grid(weight, group_size, ratio)
        found = loss(grid.dequantize(grid.quantize(weight)))
        best = torch.where(found < lowest, ratio, best)
        lowest = torch.minimum(found, lowest)
    return best


def join_grids(grids: Sequence[WeightGrid]) -> WeightGrid:
    """One grid of all the rows."""
    names = _tensors(grids[0])
    return _with(
        grids[0], {name: torch.cat([_tensors(grid)[name] for grid in grids]) for name in names}
    )


def split_grid(grid: WeightGrid, sizes: Sequence[int]) -> list[WeightGrid]:
    """A grid's rows, as grids of so many each."""
    pieces = zip(*(tensor.split(list(sizes)) for tensor in _tensors(grid).values()), strict=True)
    return [_with(grid, dict(zip(_tensors(grid), piece, strict=True))) for piece in pieces]


def _tensors(grid: WeightGrid) -> dict[str, Tensor]:
    return {name: value for name, value in vars(grid).items() if isinstance(value, Tensor)}


def _with(grid: WeightGrid, tensors: Mapping[str, Any]) -> WeightGrid:
    return replace(grid, **tensors)


def _by_group(moments: Tensor, group_size: int) -> Tensor:
    """[K/g, g] of [K], [K/g, g, g] of [K, K]."""
    if moments.dim() == 1:
        return moments.reshape(-1, group_size)
    blocks: Tensor = moments.unflatten(0, (-1, group_size)).unflatten(2, (-1, group_size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _weighted_square(error: Tensor, metric: Tensor) -> Tensor:
    """[N, G]: the loss of error [N, G, g] by metric [G, g] or [G, g, g]."""
    if metric.dim() == 2:
        return (error.square_() * metric).sum(dim=-1)
    return (torch.einsum("ngi,gij->ngj", error, metric) * error).sum(dim=-1)


def _search_ratio(weight: Tensor, moments: Tensor) -> ChannelGrid:
    """The best common ratio by which each row's range is shrunk."""
    best = torch.ones(len(weight), device=weight.device)
    lowest = torch.full_like(best, torch.inf)
    for ratio in CLIP_RATIOS:
        grid = ChannelGrid.fit(weight, ratio)
        error = grid.dequantize(grid.quantize(weight)) - weight
        loss = _weighted_square(error[:, None], moments[None])[:, 0]
        best = torch.where(loss < lowest, ratio, best)
        lowest = torch.minimum(loss, lowest)
    return ChannelGrid.fit(weight, best)


def _search_groups(weight: Tensor, group_size: int, metric: Tensor) -> GroupGrid:
    """The best level-2 scale and zero of each group, level 1 spanning the row."""
    grid = fit_grid(weight, group_size)
    assert isinstance(grid, GroupGrid)
    level1 = (weight / grid.scale.float()[:, None]).unflatten(1, (-1, group_size))
    best = _Candidate(torch.ones_like(level1[..., 0]), torch.zeros_like(level1[..., 0]))
    lowest = torch.full_like(level1[..., 0], torch.inf)
    for candidate in _candidates(level1):
        loss = candidate.loss(level1, metric)
        better = loss < lowest
        best = best.replaced(better, candidate)
        lowest = torch.minimum(loss, lowest)
    return GroupGrid(grid.scale, best.scale.to(torch.uint8), best.zero.to(torch.uint8), group_size)


@dataclass(frozen=True)
class _Candidate:
    """Level-2 scales and zeros, float32 [N, K/g] both."""

    scale: Tensor
    zero: Tensor

    def loss(self, level1: Tensor, metric: Tensor) -> Tensor:
        """[N, K/g]: what rounding level1 [N, K/g, g] loses. All codes may be used: rounding moves what
        is within the protective range by half a scale, and so not beyond 8 bits."""
        scale, zero = self.scale[..., None], self.zero[..., None]
        codes = torch.round(level1 / scale + zero).clamp_(0, CODE_MAX)
        return _weighted_square(codes.sub_(zero).mul_(scale).sub_(level1), metric)

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
            yield _Candidate(scale, zero.clamp(0, CODE_MAX).minimum(torch.floor(127 / scale)))
