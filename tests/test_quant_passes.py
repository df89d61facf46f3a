"""Passes: what a layer computes stays as it was, in float64, and rounding gets easier."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qserve.formats.kv import quantize_kv
from qserve.models import names
from qserve.models.attention import DenseAttention
from qserve.models.rope import rope_table
from qserve.models.source import WeightSource
from qserve.quant.calibrate import Layer, read_layer
from qserve.quant.hadamard import HadamardError, hadamard
from qserve.quant.layer import LayerQuantizer
from qserve.quant.recipe import RECIPES, Recipe
from qserve.quant.rotate import RotatedSource
from qserve.quant.smooth import (
    LayerPass,
    ReorderChannels,
    RotateValues,
    SmoothAttention,
    SmoothInputs,
    SmoothOutputs,
    Statistics,
)
from qserve.testing.tiny import MemorySource, tiny_config, tiny_source

FAMILIES = {
    "llama-gqa": tiny_config(),
    "llama-tied": tiny_config(tie_word_embeddings=True, num_key_value_heads=4),
    "llama-bias": tiny_config(attention_bias=True),
    "qwen2-bias": tiny_config("Qwen2ForCausalLM"),
    "qwen3-qk-norm": tiny_config("Qwen3ForCausalLM"),
}
LENGTH = 16


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 64, 108, 244, 344, 576, 896, 1536])
def test_hadamard_is_orthonormal_and_flat(order: int) -> None:
    matrix = hadamard(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))


@pytest.mark.parametrize("order", [0, 3, 6, 10, 92])
def test_hadamard_names_an_order_it_cannot_construct(order: int) -> None:
    with pytest.raises(HadamardError, match=f"order {order} "):
        hadamard(order)


def _quantizer(source: WeightSource, recipe: Recipe = RECIPES["rtn"]) -> LayerQuantizer:
    return LayerQuantizer(source.config, recipe, 64, LENGTH)


def _layers(source: WeightSource) -> list[Layer]:
    return [
        read_layer(source, index, dtype=torch.float64) for index in range(source.config.num_layers)
    ]


UNROUNDED = replace(RECIPES["rtn"], activation_bits=16, kv_bits=16, k_hadamard=True)


def _logits(source: WeightSource, layers: list[Layer]) -> Tensor:
    """float64 logits of two sequences."""
    tokens = torch.arange(2 * LENGTH) * 7 % source.config.vocab_size
    x = source.tensor(names.EMBEDDING).double()[tokens]
    for layer in layers:
        (x,) = _quantizer(source, UNROUNDED).run_served(layer, [x])
    norm = source.tensor(names.FINAL_NORM).double()
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], norm, source.config.rms_norm_eps)
    tied = source.config.tie_word_embeddings
    return x @ source.tensor(names.EMBEDDING if tied else names.LM_HEAD).double().T


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_leaves_logits_unchanged(family: str) -> None:
    source = tiny_source(FAMILIES[family])
    rotated = RotatedSource(source)
    assert not torch.allclose(
        rotated.tensor(names.EMBEDDING), source.tensor(names.EMBEDDING).double(), atol=0.1
    )
    expected = _logits(source, _layers(source))
    assert torch.allclose(_logits(rotated, _layers(rotated)), expected, rtol=1e-9, atol=1e-9)


PASSES: list[LayerPass] = [
    SmoothAttention(0.5),
    SmoothAttention(0.5, 0.5),
    SmoothInputs(0.85, 0.15),
    SmoothOutputs(0.3, 0.7),
    ReorderChannels(),
    RotateValues(),
]


@pytest.mark.parametrize("layer_pass", PASSES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_pass_leaves_logits_unchanged(family: str, layer_pass: LayerPass) -> None:
    source = tiny_source(FAMILIES[family])
    layers = _layers(source)
    quantizer = _quantizer(source)
    x = torch.randn(LENGTH, source.config.hidden_size, dtype=torch.float64)
    changed = [layer_pass(layer, quantizer.statistics(layer, x), source.config) for layer in layers]
    untouched = isinstance(layer_pass, SmoothAttention) and source.config.qk_norm
    same = all(
        name in layers[0] and torch.equal(tensor, layers[0][name])
        for name, tensor in changed[0].items()
    )
    assert same == untouched
    assert torch.allclose(_logits(source, changed), _logits(source, layers), rtol=1e-9, atol=1e-9)


def test_smooth_attention_takes_the_loudness_out_of_keys() -> None:
    source = tiny_source()
    layer = read_layer(source, 0, dtype=torch.float64)
    layer["self_attn.k_proj.weight"][5] *= 50
    quantizer = _quantizer(source)
    x = torch.randn(LENGTH, 128, dtype=torch.float64)
    before = quantizer.statistics(layer, x)
    smoothed = SmoothAttention(1.0)(layer, before, source.config)
    after = quantizer.statistics(smoothed, x).key
    assert before.key[0].max() > 20 * before.key[0].median()
    pairs = torch.maximum(after[:, :32], after[:, 32:])
    assert torch.allclose(pairs, torch.ones_like(pairs))


def test_smooth_attention_heeds_the_loudest_query_of_a_key_head() -> None:
    source = tiny_source()
    layer = read_layer(source, 0, dtype=torch.float64)
    layer["self_attn.q_proj.weight"][64 + 5] *= 40  # the second query head of the first key head
    statistics, _ = _statistics(source, layer)
    smoothed = SmoothAttention(0.0, 1.0)(layer, statistics, source.config)
    ratios = smoothed["self_attn.k_proj.weight"] / layer["self_attn.k_proj.weight"]
    loudest = statistics.query.unflatten(0, (2, 2)).amax(dim=1).unflatten(1, (2, 32)).amax(dim=1)
    assert torch.allclose(ratios[:, 0], loudest.repeat(1, 2).flatten())


@pytest.mark.parametrize(
    "layer_pass",
    [SmoothAttention(0.5, 0.5), SmoothInputs(0.5, 0.5), SmoothOutputs(0.5, 0.5)],
    ids=str,
)
def test_channels_that_are_always_zero_are_left_alone(layer_pass: LayerPass) -> None:
    source = tiny_source()
    layer = read_layer(source, 0, dtype=torch.float64)
    layer["self_attn.q_proj.weight"][[5, 37, 69, 101]] = 0.0
    layer["mlp.up_proj.weight"][7] = 0.0
    layer["mlp.down_proj.weight"][:, 9] = 0.0
    layer[names.ATTENTION_NORM][3] = 0.0
    statistics, x = _statistics(source, layer)
    changed = layer_pass(layer, statistics, source.config)
    assert all(tensor.isfinite().all() for tensor in changed.values())
    quantizer = _quantizer(source, UNROUNDED)
    expected, found = (quantizer.run_served(each, [x])[0] for each in (layer, changed))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_key_hadamard_and_center_cancel_and_kv_bits_act(kv_bits: int) -> None:
    config = tiny_source().config
    qkv = torch.randn(2 * LENGTH, config.query_size + 2 * config.kv_size, dtype=torch.float64)
    table = rope_table(config, LENGTH)
    seen: list[Tensor] = []
    plain = DenseAttention(config, LENGTH, table, kv_bits=kv_bits)
    center = torch.randn(config.num_kv_heads, config.head_dim)
    turned = replace(
        plain, hadamard=True, key_center=center, observer=lambda _, q, k, v: seen.append(k)
    )
    difference = (turned(0, qkv) - plain(0, qkv)).abs().max()
    assert difference < 1e-9 if kv_bits == 16 else difference > 1e-4
    stored = quantize_kv(seen[0], kv_bits).dequantize() if kv_bits < 16 else seen[0]
    assert (stored - seen[0]).abs().max() > 0 or kv_bits == 16


def _statistics(source: MemorySource, layer: Layer) -> tuple[Statistics, Tensor]:
    """Of a layer, on a sample that is returned too."""
    x = torch.randn(LENGTH, source.config.hidden_size, dtype=torch.float64)
    return _quantizer(source).statistics(layer, x), x


def test_smoothed_outputs_take_the_loudness_out_of_the_weights_that_read_them() -> None:
    source = tiny_source()
    layer = read_layer(source, 0, dtype=torch.float64)
    layer["mlp.down_proj.weight"][:, 7] *= 40
    layer["self_attn.o_proj.weight"][:, 70] *= 40
    statistics, _ = _statistics(source, layer)
    smoothed = SmoothOutputs(0.0, 1.0)(layer, statistics, source.config)
    down = smoothed["mlp.down_proj.weight"].abs().amax(dim=0)
    assert torch.allclose(down, torch.ones_like(down))
    output = smoothed["self_attn.o_proj.weight"].abs().amax(dim=0).reshape(2, 2, 64).amax(dim=1)
    assert torch.allclose(output, torch.ones_like(output))


def test_reordered_channels_are_sorted_by_loudness_and_keep_to_their_head() -> None:
    source = tiny_source()
    layer = read_layer(source, 0, dtype=torch.float64)
    before, x = _statistics(source, layer)
    ordered = ReorderChannels()(layer, before, source.config)
    after = _quantizer(source).statistics(ordered, x).inputs
    assert (after[names.DOWN].diff() >= 0).all()
    heads = after[names.OUTPUT].reshape(2, 2, 64)
    assert (heads.amax(dim=1).diff(dim=1) >= -1e-12).all()
    expected = before.inputs[names.OUTPUT].reshape(4, 64).sort(dim=1).values
    assert torch.allclose(heads.reshape(4, 64).sort(dim=1).values, expected)
