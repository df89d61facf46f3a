"""One layer: its passes, then its linears rounded one after the other, each seeing what the served
model will give it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from qserve.formats.activation import quantize_activation
from qserve.formats.weight import QuantizedWeight, W8Weight, WeightGrid, fit_grid
from qserve.models import names
from qserve.models.attention import DenseAttention
from qserve.models.config import ModelConfig
from qserve.models.rope import rope_table
from qserve.quant.calibrate import (
    FUSED_LINEARS,
    Layer,
    PausedLayer,
    fused_bias,
    fused_weight,
    head_norm,
)
from qserve.quant.clip import search_grid
from qserve.quant.recipe import Recipe
from qserve.quant.rounding import Moments, damped, gptq, no_worse, propagated
from qserve.quant.smooth import Statistics


@dataclass(frozen=True)
class Streams:
    """What reaches a layer in the unquantized and in the served model: batches [T, H] of whole
    sequences."""

    exact: list[Tensor]
    served: list[Tensor]

    @property
    def error(self) -> float:
        """Squared difference over square, the mean over tokens."""
        ratios = [
            (served - exact).square().sum(dim=1) / exact.square().sum(dim=1)
            for exact, served in zip(self.exact, self.served, strict=True)
        ]
        return float(torch.cat(ratios).mean())


@dataclass(frozen=True)
class QuantizedLayer:
    """tensors: all but the weights of linears. weights: these, by the linears' names.
    served: the layer as a float one, with the weights that the packed ones stand for."""

    tensors: Layer
    weights: dict[str, QuantizedWeight]
    served: Layer


class LayerQuantizer:
    """Quantizes layers of one model by one recipe, on sequences of one length."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        group_size: int,
        length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.recipe, self.group_size = config, recipe, group_size
        table = rope_table(config, length).to(device)
        self._exact = DenseAttention(config, length, table)
        self._served = replace(self._exact, hadamard=recipe.k_hadamard, kv_bits=recipe.kv_bits)

    def quantize(self, layer: Layer, streams: Streams) -> tuple[QuantizedLayer, Streams]:
        """The layer, and what leaves it."""
        layer = self._prepared(layer, streams.exact[0])
        rounded = dict(layer)
        exact = PausedLayer(layer, self.config, streams.exact, self._attend_exactly)
        served = PausedLayer(layer, self.config, streams.served, self._attend_as_served(rounded))
        weights: dict[str, QuantizedWeight] = {}
        for parts in FUSED_LINEARS:
            inputs = [self._activation(x) for x in served.inputs]
            moments = Moments.of(exact.inputs, inputs, exact.residuals)
            for part, weight in self._rounded(layer, parts, moments).items():
                weights[part] = weight
                rounded[f"{part}.weight"] = weight.dequantize().to(layer[f"{part}.weight"])
            outputs = _linear(rounded, parts, inputs)
            if parts == names.QKV and self.recipe.k_center:
                rounded[names.KEY_CENTER] = self._mean_key(rounded, outputs)
            exact.resume(_linear(layer, parts, exact.inputs))
            served.resume(outputs)
        float_names = rounded.keys() - {f"{part}.weight" for part in weights}
        tensors = {name: rounded[name] for name in sorted(float_names)}
        return QuantizedLayer(tensors, weights, rounded), Streams(exact.outputs, served.outputs)

    def run_exact(self, layer: Layer, batches: Sequence[Tensor]) -> list[Tensor]:
        """What leaves an unquantized layer."""
        run = PausedLayer(layer, self.config, batches, self._attend_exactly)
        for parts in FUSED_LINEARS:
            run.resume(_linear(layer, parts, run.inputs))
        return run.outputs

    def run_served(self, layer: Layer, batches: Sequence[Tensor]) -> list[Tensor]:
        """What leaves a layer when its activations, keys and values are quantized."""
        run = PausedLayer(layer, self.config, batches, self._attend_as_served(layer))
        for parts in FUSED_LINEARS:
            run.resume(_linear(layer, parts, [self._activation(x) for x in run.inputs]))
        return run.outputs

    def _attend_exactly(self, qkv: Tensor) -> Tensor:
        return self._exact(0, qkv)

    def _attend_as_served(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """Attention over quantized keys and values, by the center that the layer then has."""
        return lambda qkv: replace(self._served, key_center=layer.get(names.KEY_CENTER))(0, qkv)

    def _mean_key(self, layer: Layer, outputs: Sequence[Tensor]) -> Tensor:
        """[Hkv, D]: the mean key, after RoPE, of batches of qkv."""
        means: list[Tensor] = []
        attention = replace(self._exact, observer=lambda _, q, k, v: means.append(k.mean(dim=0)))
        for qkv in outputs:
            attention(0, head_norm(layer, self.config, qkv))
        return torch.stack(means).mean(dim=0)

    def _activation(self, x: Tensor) -> Tensor:
        if self.recipe.activation_bits == 16:
            return x
        return quantize_activation(x).dequantize(x.dtype)

    def _rounded(
        self, layer: Layer, parts: Sequence[str], moments: Moments
    ) -> dict[str, QuantizedWeight]:
        hessian = damped(moments.hessian, self.recipe.damping)
        weight = propagated(fused_weight(layer, parts), moments, hessian, self.recipe.propagation)
        sizes = [len(layer[f"{part}.weight"]) for part in parts]
        rows = weight.split(sizes)
        if self.recipe.weight_bits == 8 or set(parts) & set(self.recipe.wide_linears):
            return {part: W8Weight.quantize(own) for part, own in zip(parts, rows, strict=True)}
        grid = self._grid(weight, hessian.diagonal())
        codes = self._codes(weight, grid, hessian)
        return {
            part: part_grid.pack(part_codes)
            for part, part_grid, part_codes in zip(
                parts, _split_grid(grid, sizes), codes.split(sizes), strict=True
            )
        }

    def _grid(self, weight: Tensor, importance: Tensor) -> WeightGrid:
        if self.recipe.grid == "span":
            return fit_grid(weight, self.group_size)
        return search_grid(weight, self.group_size, importance.to(weight.dtype))

    def _codes(self, weight: Tensor, grid: WeightGrid, hessian: Tensor) -> Tensor:
        if self.recipe.rounding == "nearest":
            return grid.quantize(weight)
        return no_worse(gptq(weight, grid, hessian), grid.quantize(weight), weight, grid, hessian)

    def _prepared(self, layer: Layer, sample: Tensor) -> Layer:
        """The layer after the recipe's passes, without those that make it worse."""
        if not self.recipe.passes:
            return layer
        statistics = self.statistics(layer, sample)
        expected = self.run_exact(layer, [sample])
        best = self._trial_error(layer, sample, expected)
        for layer_pass in self.recipe.passes:
            candidate = layer_pass(layer, statistics, self.config)
            error = self._trial_error(candidate, sample, expected)
            if error <= best or not self.recipe.guarded:
                layer, best = candidate, error
                statistics = self.statistics(layer, sample)
        return layer

    def _trial_error(self, layer: Layer, sample: Tensor, expected: list[Tensor]) -> float:
        """The error of the layer rounded to the nearest codes."""
        trial = dict(layer)
        for parts in FUSED_LINEARS:
            for part in parts:
                weight = layer[f"{part}.weight"]
                grid = fit_grid(weight, self.group_size)
                trial[f"{part}.weight"] = grid.dequantize(grid.quantize(weight)).to(weight.dtype)
        return Streams(expected, self.run_served(trial, [sample])).error

    def statistics(self, layer: Layer, sample: Tensor) -> Statistics:
        """What the passes want to know of an unquantized layer on whole sequences [T, H]."""
        heads: dict[str, Tensor] = {}

        def observe(_: int, query: Tensor, key: Tensor, value: Tensor) -> None:
            heads["query"], heads["key"] = query.abs().amax(dim=0), key.abs().amax(dim=0)

        attention = replace(self._exact, observer=observe)
        run = PausedLayer(layer, self.config, [sample], partial(attention, 0))
        inputs: dict[tuple[str, ...], Tensor] = {}
        for parts in FUSED_LINEARS:
            inputs[parts] = run.inputs[0].abs().amax(dim=0)
            run.resume(_linear(layer, parts, run.inputs))
        return Statistics(inputs, **heads)


def _linear(layer: Layer, parts: Sequence[str], inputs: Sequence[Tensor]) -> list[Tensor]:
    weight, bias = fused_weight(layer, parts), fused_bias(layer, parts)
    return [functional.linear(x, weight, bias) for x in inputs]


def _split_grid(grid: WeightGrid, sizes: Sequence[int]) -> list[WeightGrid]:
    """A grid's rows, as grids of so many each."""
    tensors = {name: value for name, value in vars(grid).items() if isinstance(value, Tensor)}
    pieces = zip(*(tensor.split(list(sizes)) for tensor in tensors.values()), strict=True)
    return [replace(grid, **dict(zip(tensors, piece, strict=True))) for piece in pieces]
