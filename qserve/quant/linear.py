"""One fused linear: from its weights and the second moments of its inputs to packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats.weight import QuantizedWeight, W8Weight, WeightGrid, fit_grid
from qserve.quant.clip import join_grids, search_grid, split_grid
from qserve.quant.recipe import Recipe
from qserve.quant.rounding import Moments, damped, gptq, no_worse, propagated


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
        hessian = damped(moments.hessian, self.recipe.damping)
        weight = propagated(torch.cat(list(weights)), moments, hessian, self.recipe.propagation)
        sizes = [len(own) for own in weights]
        grids = [
            fit_grid(own, self.group_size, self._per_group(ratio, own))
            for own, ratio in zip(weight.split(sizes), ratios, strict=False)
        ]
        rest = weight[sum(sizes[: len(ratios)]) :]
        if len(rest):
            grids.append(self._grid(rest, hessian))
        grid = join_grids(grids)
        codes = self._codes(weight, grid, hessian).split(sizes)
        grids = split_grid(grid, sizes)
        return [own.pack(rounded) for own, rounded in zip(grids, codes, strict=True)]

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight rounded on the grid that spans it, float32 [N, K]."""
        if self.recipe.weight_bits == 8:
            return W8Weight.quantize(weight).dequantize()
        grid = fit_grid(weight, self.group_size)
        return grid.dequantize(grid.quantize(weight))

    def _grid(self, weight: Tensor, hessian: Tensor) -> WeightGrid:
        if self.recipe.grid == "span":
            return fit_grid(weight, self.group_size)
        moments = hessian.diagonal() if self.recipe.grid == "search" else hessian
        return search_grid(weight, self.group_size, moments.to(weight.dtype))

    def _codes(self, weight: Tensor, grid: WeightGrid, hessian: Tensor) -> Tensor:
        if self.recipe.rounding == "nearest":
            return grid.quantize(weight)
        return no_worse(gptq(weight, grid, hessian), grid.quantize(weight), weight, grid, hessian)

    def _per_group(self, ratio: Tensor, weight: Tensor) -> Tensor:
        return ratio if self.group_size == -1 else ratio[:, None]
