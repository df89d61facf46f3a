"""One layer: what it is fitted to, and that what it is fitted as is what is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.config import EngineConfig
from qserve.engine.loading import load_model
from qserve.evaluation.sequences import SequenceScorer
from qserve.formats.grid import ChannelGrid
from qserve.formats.weight import W4Weight
from qserve.models import names
from qserve.models.attention import DenseAttention
from qserve.models.config import ModelConfig
from qserve.models.layers import Product
from qserve.models.rope import rope_table
from qserve.models.source import WeightSource
from qserve.quant.calibrate import Layer, PausedLayer, fused_bias, fused_weight, read_layer
from qserve.quant.clip import CLIP_RATIOS
from qserve.quant.layer import LayerQuantizer, QuantizedLayer, Streams
from qserve.quant.recipe import RECIPES, Recipe
from qserve.quant.smooth import LayerPass, OneOf, SmoothOutputs
from qserve.testing.tiny import MemorySource, tiny_config, tiny_source

LENGTH = 16
RTN = RECIPES["rtn"]


def _quantizer(source: WeightSource, recipe: Recipe = RTN, group_size: int = 64) -> LayerQuantizer:
    return LayerQuantizer(source.config, recipe, group_size, LENGTH)


def _held_out_error(source: MemorySource, recipe: Recipe) -> float:
    embedding = source.tensor(names.EMBEDDING)
    tokens = torch.randint(0, source.config.vocab_size, (40, LENGTH))
    held_out, *fitted = [embedding[window] for window in tokens]
    quantizer = _quantizer(source, recipe)
    layer = read_layer(source, 0)
    quantized, _ = quantizer.quantize(layer, Streams(fitted, fitted))
    expected = quantizer.run_exact(layer, [held_out])
    return Streams(expected, quantizer.run_served(quantized.served, [held_out])).error


def test_default_recipe_beats_rounding_to_nearest_on_tokens_it_has_not_seen() -> None:
    source = tiny_source()
    errors = {name: _held_out_error(source, RECIPES[name]) for name in ("rtn", "qoq")}
    assert errors["qoq"] < 0.8 * errors["rtn"]


def test_served_layer_holds_the_packed_weights() -> None:
    source = tiny_source()
    x = [torch.randn(LENGTH, 128)]
    quantized, streams = _quantizer(source).quantize(read_layer(source, 0), Streams(x, x))
    for linear, weight in quantized.weights.items():
        assert torch.equal(quantized.served[f"{linear}.weight"], weight.dequantize())
    expected = _quantizer(source).run_served(quantized.served, x)
    assert torch.allclose(streams.served[0], expected[0])
    assert torch.allclose(
        streams.exact[0], _quantizer(source).run_exact(read_layer(source, 0), x)[0]
    )


def _served(source: MemorySource, quantized: QuantizedLayer, recipe: Recipe, x: Tensor) -> Tensor:
    """What leaves the layer [T, H] when it is loaded and run over pages, in whole sequences."""
    outer = {name: tensor for name, tensor in source.tensors.items() if ".layers." not in name}
    hf_config = {**source.hf_config, "quantization_config": recipe.quantization(64).to_json()}
    loaded = MemorySource(hf_config, outer | _by_full_name(quantized))
    model = load_model(loaded, EngineConfig(device="cpu"))
    attend = SequenceScorer(model).attention([LENGTH] * (len(x) // LENGTH))
    added, stream = model.decoder.layers[0](x, None, attend, 0)
    return stream + (added.tensor() if isinstance(added, Product) else added)


def _by_full_name(quantized: QuantizedLayer) -> Layer:
    prefix = names.layer_prefix(0)
    packed = {
        f"{linear}.{suffix}": tensor
        for linear, weight in quantized.weights.items()
        for suffix, tensor in weight.tensors().items()
    }
    return {prefix + name: tensor for name, tensor in (quantized.tensors | packed).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_bits": 8, "kv_bits": 8},
        {"weight_bits": 8, "activation_bits": 16, "k_hadamard": True},
        {"weight_bits": 8, "activation_bits": 16, "k_center": True},
        {"k_hadamard": True, "k_center": True},
    ],
    ids=["A8", "KV4, keys rotated", "KV4, keys centered", "all"],
)
def test_a_layer_is_fitted_to_what_is_served(changes: dict[str, Any]) -> None:
    """The decoder's own ops, int8 and pages, give what calibration simulates."""
    source = tiny_source(tiny_config("Qwen3ForCausalLM", num_hidden_layers=1, attention_bias=True))
    recipe = replace(RTN, **changes)
    x = torch.randn(4 * LENGTH, source.config.hidden_size)
    quantizer, layer = _quantizer(source, recipe), read_layer(source, 0)
    quantized, streams = quantizer.quantize(layer, Streams([x], [x]))
    simulated, served = streams.served, [_served(source, quantized, recipe, x)]
    assert Streams(served, simulated).error < 1e-6 * streams.error


def test_center_is_the_mean_key_of_the_rounded_layer() -> None:
    source = tiny_source(tiny_config("Qwen3ForCausalLM", attention_bias=True))
    recipe = replace(RECIPES["rtn"], activation_bits=16, kv_bits=16, k_hadamard=True, k_center=True)
    x = torch.randn(2 * LENGTH, source.config.hidden_size)
    streams = Streams([x[:LENGTH], x[LENGTH:]], [x[:LENGTH], x[LENGTH:]])
    quantized, _ = _quantizer(source, recipe).quantize(read_layer(source, 0), streams)
    seen: list[Tensor] = []
    attention = DenseAttention(
        source.config,
        LENGTH,
        rope_table(source.config, LENGTH),
        observer=lambda _, query, key, value: seen.append(key),
    )
    run = PausedLayer(quantized.served, source.config, [x], lambda qkv: attention(0, qkv))
    weight, bias = (join(quantized.served, names.QKV) for join in (fused_weight, fused_bias))
    run.resume([torch.nn.functional.linear(run.inputs[0], weight, bias)])
    center = quantized.tensors[names.KEY_CENTER]
    torch.testing.assert_close(center, seen[0].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert center.abs().max() > 0.1


def _louder_down(layer: Layer, loudness: float) -> Layer:
    """The same layer, one input of down_proj in 64 so many times as loud."""
    up, down = "mlp.up_proj.weight", "mlp.down_proj.weight"
    factor = torch.ones(layer[up].shape[0])
    factor[::64] = loudness
    return {**layer, up: layer[up] / factor[:, None], down: layer[down] * factor}


def _ruin_down(layer: Layer, *_: Any) -> Layer:
    """An exact pass that makes rounding hopeless."""
    return _louder_down(layer, 1e3)


def test_a_pass_that_makes_the_error_worse_is_left_out() -> None:
    source = tiny_source()
    x = [torch.randn(LENGTH, 128)]
    for guarded in (True, False):
        recipe = replace(RECIPES["rtn"], passes=(_ruin_down,), guarded=guarded)
        _, ruined = _quantizer(source, recipe).quantize(read_layer(source, 0), Streams(x, x))
        _, plain = _quantizer(source).quantize(read_layer(source, 0), Streams(x, x))
        assert (ruined.error > 1.2 * plain.error) == (not guarded)


def test_a_pass_is_judged_by_what_those_before_it_reached() -> None:
    """The second undoes half of what the first gains, and so is left out."""
    source = tiny_source()
    layer = _louder_down(read_layer(source, 0), 64.0)
    x = [torch.randn(LENGTH, 128)]
    passes = tuple(
        lambda layer, *_, loudness=loudness: _louder_down(layer, loudness)
        for loudness in (1 / 64, 8.0)
    )
    errors = []
    for tried in (passes, passes[:1], ()):
        recipe = replace(RECIPES["rtn"], passes=tried, guarded=True)
        errors.append(_quantizer(source, recipe).quantize(layer, Streams(x, x))[1].error)
    assert errors[0] == errors[1] < 0.8 * errors[2]


def test_of_several_passes_the_best_is_taken() -> None:
    source = tiny_source()
    layer = read_layer(source, 0)
    layer["mlp.down_proj.weight"][:, ::9] *= 30
    x = torch.randn(4 * LENGTH, source.config.hidden_size)
    choices = (SmoothOutputs(1.0, 0.0), SmoothOutputs(0.0, 1.0), SmoothOutputs(0.5, 0.5))

    def error(*passes: LayerPass | OneOf) -> float:
        recipe = replace(RECIPES["rtn"], passes=passes, kv_bits=16)
        _, streams = _quantizer(source, recipe).quantize(layer, Streams([x], [x]))
        return streams.error

    alone = [error(choice) for choice in choices]
    assert error(OneOf(choices)) == min(alone)
    assert max(alone) > 1.2 * min(alone)


def test_queries_and_keys_are_clipped_by_what_attention_loses() -> None:
    """Against every ratio tried by hand, each head's by the outputs that it acts on."""
    source = tiny_source()
    layer, config = read_layer(source, 0), source.config
    layer["self_attn.q_proj.weight"][3::64] *= 4  # rows that make the others' heads worth clipping
    layer["self_attn.k_proj.weight"][70] *= 6
    x = torch.randn(4 * LENGTH, config.hidden_size)
    served = x + 0.2 * torch.randn_like(x)
    recipe = replace(RTN, kv_bits=16, activation_bits=16, grid="output")
    quantized, _ = _quantizer(source, recipe, -1).quantize(layer, Streams([x], [served]))
    exact = _attention(config, layer, x)
    for part, heads in (("self_attn.q_proj", 4), ("self_attn.k_proj", 2)):
        weight, losses = layer[f"{part}.weight"], []
        for ratio in CLIP_RATIOS:
            grid = ChannelGrid.fit(weight, ratio)
            trial = {**layer, f"{part}.weight": grid.dequantize(grid.quantize(weight))}
            lost = (_attention(config, trial, served) - exact).square()
            losses.append(lost.reshape(len(x), heads, -1).sum(dim=(0, 2)))
        best = torch.tensor(CLIP_RATIOS)[torch.stack(losses).argmin(dim=0)]
        assert best.min() < 1 and len(best.unique()) > 1
        packed = quantized.weights[part]
        assert isinstance(packed, W4Weight)
        expected = ChannelGrid.fit(weight, best.repeat_interleave(64)).scale
        assert torch.equal(packed.s1_scales, expected), part


def test_weights_are_fitted_to_the_inputs_that_they_will_see() -> None:
    source = tiny_source()
    recipe = replace(RECIPES["gptq"], activation_bits=8, kv_bits=4)
    exact, served = torch.randn(2, 8 * LENGTH, 128)

    def query(first: Tensor, second: Tensor, recipe: Recipe = recipe) -> Tensor:
        streams = Streams([first], [second])
        quantized, _ = _quantizer(source, recipe).quantize(read_layer(source, 0), streams)
        return quantized.served["self_attn.q_proj.weight"]

    fitted = query(exact, served)
    assert torch.equal(fitted, query(served, served))
    assert not torch.equal(fitted, query(exact, exact))
    assert not torch.equal(fitted, query(exact, served, replace(recipe, activation_bits=16)))
    assert not torch.equal(fitted, query(exact, served, replace(recipe, propagation=0.5)))


def test_tokens_drowned_by_their_residual_stream_do_not_count() -> None:
    """Where the output is added to the stream: a norm later divides by the stream's magnitude."""
    source = tiny_source()
    quiet, loud = torch.randn(8 * LENGTH, 128), 1e4 * torch.randn(8 * LENGTH, 128)
    recipe = replace(RECIPES["gptq"], kv_bits=16, wide_linears=("self_attn.q_proj",), damping=0.01)
    wide = frozenset({"self_attn.q_proj"})
    fitted = []
    for streams in (Streams([quiet], [quiet]), Streams([quiet, loud], [quiet, loud])):
        quantized, _ = _quantizer(source, recipe).quantize(read_layer(source, 0), streams, wide)
        fitted.append({part: each.integers() for part, each in quantized.weights.items()})
    same = {part: float((fitted[0][part] == fitted[1][part]).float().mean()) for part in fitted[0]}
    assert same["self_attn.o_proj"] > 0.999
    assert same["mlp.gate_proj"] < 0.95


def _attention(config: ModelConfig, layer: Layer, x: Tensor) -> Tensor:
    """What attention gives for x [T, H]."""
    attend = DenseAttention(config, LENGTH, rope_table(config, LENGTH))
    run = PausedLayer(layer, config, [x], lambda qkv: attend(0, qkv))
    run.resume([run.inputs[0] @ fused_weight(layer, names.QKV).T])
    return run.inputs[0]
