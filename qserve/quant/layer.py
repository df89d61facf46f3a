"""One layer: its passes, then its linears rounded one after the other, each seeing what the served
model will give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from qserve.formats.activation import quantize_activation
from qserve.formats.weight import QuantizedWeight, W8Weight
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
from qserve.quant.clip import search_head_ratio
from qserve.quant.linear import LinearQuantizer
from qserve.quant.recipe import Recipe
from qserve.quant.smooth import OneOf, Statistics


@dataclass(frozen=True)
class Streams:
    """What reaches a layer in the unquantized and in the served model: batches [T, H] of whole
    sequences, on the host where the device has no room for them."""

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
        self.config, self.recipe, self.device = config, recipe, device
        self._linear = LinearQuantizer(recipe, group_size)
        self._group_size = group_size
        table = rope_table(config, length).to(device)
        self._exact = DenseAttention(config, length, table)
        self._served = replace(self._exact, hadamard=recipe.k_hadamard, kv_bits=recipe.kv_bits)

    def quantize(
        self, layer: Layer, streams: Streams, wide: frozenset[str] = frozenset()
    ) -> tuple[QuantizedLayer, Streams]:
        """The layer, and what leaves it. wide: linears to keep at 8 bits, with those fused to them."""
        layer = self._prepared(layer, streams.exact[0].to(self.device))
        rounded = dict(layer)
        exact = PausedLayer(layer, self.config, streams.exact, self._attend_exactly)
        served = PausedLayer(layer, self.config, streams.served, self._attend_as_served(rounded))
        weights: dict[str, QuantizedWeight] = {}
        for parts in FUSED_LINEARS:
            narrow = self.recipe.weight_bits == 4 and not wide & set(parts)
            own = (self._narrow if narrow else self._wide)(layer, parts, exact, served)
            for part, weight in zip(parts, own, strict=True):
                weights[part] = weight
                rounded[f"{part}.weight"] = weight.dequantize().to(layer[f"{part}.weight"])
            if parts == names.QKV and self.recipe.k_center:
                qkv = _linear(rounded, parts, self._activations(served))
                rounded[names.KEY_CENTER] = self._mean_key(rounded, qkv)
            exact.resume(_linear(layer, parts, exact.inputs))
            served.resume(_linear(rounded, parts, self._activations(served)))
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
            run.resume(_linear(layer, parts, self._activations(run)))
        return run.outputs

    def _attend_exactly(self, qkv: Tensor) -> Tensor:
        return self._exact(0, qkv)

    def _attend_as_served(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """Attention over quantized keys and values, by the center that the layer then has."""
        return lambda qkv: replace(self._served, key_center=layer.get(names.KEY_CENTER))(0, qkv)

    def _mean_key(self, layer: Layer, outputs: Iterable[Tensor]) -> Tensor:
        """[Hkv, D]: the mean key, after RoPE, of batches of qkv."""
        means: list[Tensor] = []
        attention = replace(self._exact, observer=lambda _, q, k, v: means.append(k.mean(dim=0)))
        for qkv in outputs:
            attention(0, head_norm(layer, self.config, qkv))
        return torch.stack(means).mean(dim=0)

    def _activations(self, run: PausedLayer) -> Iterator[Tensor]:
        """What the paused linear multiplies when served, of each batch [T, K], on the device."""
        for x in run.inputs:
            x = x.to(self.device)
            if self.recipe.activation_bits == 8:
                x = quantize_activation(x).dequantize(x.dtype)
            yield x

    def _wide(self, layer: Layer, parts: Sequence[str], *_: PausedLayer) -> list[QuantizedWeight]:
        return [W8Weight.quantize(layer[f"{part}.weight"]) for part in parts]

    def _narrow(
        self, layer: Layer, parts: Sequence[str], exact: PausedLayer, served: PausedLayer
    ) -> list[QuantizedWeight]:
        weights = [layer[f"{part}.weight"] for part in parts]
        if not self.recipe.fits_weights:
            return self._linear.quantize_plainly(weights)
        moments = self._linear.moments(
            (x.to(self.device), y, None if residual is None else residual.to(self.device))
            for x, y, residual in zip(
                exact.inputs, self._activations(served), exact.residuals, strict=True
            )
        )
        ratios = []
        if parts == names.QKV and self.recipe.grid == "output":
            ratios = self._head_ratios(layer, exact.inputs[0], next(self._activations(served)))
        return self._linear.quantize(weights, moments, ratios)

    def _head_ratios(self, layer: Layer, exact: Tensor, served: Tensor) -> list[Tensor]:
        """By which to shrink the rows [N] of queries and keys, for attention's output on a batch."""
        (qkv,) = _linear(layer, names.QKV, [exact])
        expected = self._attend_exactly(head_norm(layer, self.config, qkv))

        def loss(part: str, heads: int, weight: Tensor) -> Tensor:
            trial = {**layer, f"{part}.weight": weight.to(layer[f"{part}.weight"])}
            (qkv,) = _linear(trial, names.QKV, [served])
            output = self._attend_as_served(trial)(head_norm(trial, self.config, qkv))
            lost: Tensor = (output - expected).square().unflatten(1, (heads, -1))
            return lost.sum(dim=(0, 2))

        ratios = []
        for part, heads in zip(
            names.QKV[:2], (self.config.num_heads, self.config.num_kv_heads), strict=True
        ):
            weight = layer[f"{part}.weight"]
            found = search_head_ratio(weight, self._group_size, heads, partial(loss, part, heads))
            ratios.append(found.repeat_interleave(len(weight) // heads))
        return ratios

    def _prepared(self, layer: Layer, sample: Tensor) -> Layer:
        """The layer after the recipe's passes: of several the best, none that makes it worse."""
        if not self.recipe.passes:
            return layer
        expected = self.run_exact(layer, [sample])
        best = self._trial_error(layer, sample, expected)
        for layer_pass in self.recipe.passes:
            statistics = self.statistics(layer, sample)
            found, lowest = layer, best if self.recipe.guarded else torch.inf
            for choice in layer_pass.passes if isinstance(layer_pass, OneOf) else (layer_pass,):
                candidate = choice(layer, statistics, self.config)
                error = self._trial_error(candidate, sample, expected)
                if error <= lowest:
                    found, lowest = candidate, error
            layer, best = found, lowest
        return layer

    def _trial_error(self, layer: Layer, sample: Tensor, expected: list[Tensor]) -> float:
        """The error of the layer rounded to the nearest codes."""
        trial = dict(layer)
        for part in names.linear_shapes(self.config):
            weight = layer[f"{part}.weight"]
            trial[f"{part}.weight"] = self._linear.nearest(weight).to(weight.dtype)
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


def _linear(layer: Layer, parts: Sequence[str], inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The linear's output of each batch, one at a time, on the layer's device."""
    weight, bias = fused_weight(layer, parts), fused_bias(layer, parts)
    for x in inputs:
        yield functional.linear(x.to(weight.device), weight, bias)
