"""One fused linear: from its weights and the second moments of its inputs to packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from qserve.formats.grid import WeightGrid, fit_grid
from qserve.formats.weight import QuantizedWeight, W8Weight
from qserve.quant.clip import join_grids, search_grid, split_grid
from qserve.quant.recipe import Recipe
from qserve.quant.rounding import InverseFactor, Moments, damped, gptq, no_worse, propagated


@dataclass(frozen=True)
class LinearQuantizer:
    """Rounds weights [N, K] that share an input, by one recipe."""

    recipe: Recipe
    group_size: int

    def moments(self, batches: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> Moments:
        """What `quantize` needs of the inputs, as `Moments.of` takes them."""
        return Moments.of(batches, with_cross=self.recipe.propagation > 0)

    def quantize(
        self, weights: Sequence[Tensor], moments: Moments, ratios: Sequence[Tensor] = ()
    ) -> list[QuantizedWeight]:
        """The weights on one grid each. ratios: by which to shrink the rows [N] of the first few,
        instead of a search."""
        hessian, weight = damped(moments.hessian, self.recipe.damping), torch.cat(list(weights))
        inverse = cache(partial(InverseFactor.of, hessian))
        if moments.cross is not None:
            weight = propagated(weight, moments.cross, inverse(), self.recipe.propagation)
        sizes = [len(own) for own in weights]
        grid = self._grid(weight.split(sizes), hessian, ratios)
        codes = grid.quantize(weight)
        if self.recipe.rounding == "gptq":
            codes = no_worse(gptq(weight, grid, inverse()), codes, weight, grid, hessian)
        pieces = zip(split_grid(grid, sizes), codes.split(sizes), strict=True)
        return [own.pack(rounded) for own, rounded in pieces]

    def quantize_plainly(self, weights: Sequence[Tensor]) -> list[QuantizedWeight]:
        """The weights rounded to the nearest codes of the grids that span them."""
        grids = [fit_grid(weight, self.group_size) for weight in weights]
        return [grid.pack(grid.quantize(own)) for grid, own in zip(grids, weights, strict=True)]

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight rounded on the grid that spans it, float32 [N, K]."""
        if self.recipe.weight_bits == 8:
            return W8Weight.quantize(weight).dequantize()
        grid = fit_grid(weight, self.group_size)
        return grid.dequantize(grid.quantize(weight))

    def _grid(
        self, weights: Sequence[Tensor], hessian: Tensor, ratios: Sequence[Tensor]
    ) -> WeightGrid:
        grids = [
            fit_grid(weight, self.group_size, ratio if self.group_size == -1 else ratio[:, None])
            for weight, ratio in zip(weights, ratios, strict=False)
        ]
        if len(weights) > len(ratios):
            grids.append(self._searched(torch.cat(list(weights[len(ratios) :])), hessian))
        return join_grids(grids)

    def _searched(self, weight: Tensor, hessian: Tensor) -> WeightGrid:
        if self.recipe.grid == "span":
            return fit_grid(weight, self.group_size)
        moments = hessian.diagonal() if self.recipe.grid == "search" else hessian
        return search_grid(weight, self.group_size, moments.to(weight.dtype))
