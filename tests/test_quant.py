"""Quantization: each pass is exact before rounding, each rounding no worse than the one before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from qserve.formats.checkpoint import CheckpointWriter, QuantizationConfig
from qserve.formats.kv import quantize_kv
from qserve.formats.layout import GROUP_SCALE_MAX
from qserve.formats.weight import ChannelGrid, GroupGrid, fit_grid
from qserve.models import names
from qserve.models.attention import DenseAttention
from qserve.models.config import ModelError
from qserve.models.loader import load_decoder
from qserve.models.rope import rope_table
from qserve.models.source import WeightSource, open_source
from qserve.quant.calibrate import (
    CalibrationError,
    Layer,
    PausedLayer,
    calibration_text,
    fused_bias,
    fused_weight,
    read_layer,
)
from qserve.quant.clip import search_grid
from qserve.quant.hadamard import HadamardError, hadamard
from qserve.quant.layer import LayerQuantizer, Streams
from qserve.quant.pipeline import quantize
from qserve.quant.recipe import RECIPES, Recipe, RecipeError, find_recipe
from qserve.quant.rotate import RotatedSource
from qserve.quant.rounding import Moments, damped, error, gptq, no_worse, propagated
from qserve.quant.smooth import (
    LayerPass,
    ReorderChannels,
    RotateValues,
    SmoothAttention,
    SmoothInputs,
    SmoothOutputs,
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
QUIET = Console(quiet=True)


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


def _problem(seed: int, rows: int = 32, columns: int = 128) -> tuple[Tensor, Tensor]:
    """A weight and a damped second moment of correlated inputs with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    loudness = torch.exp(torch.randn(columns, generator=generator))
    inputs = (torch.randn(200, columns, generator=generator) @ mixing * loudness).double()
    return weight, damped(inputs.T @ inputs, 0.01)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), group_size=st.sampled_from([-1, 64, 128]))
def test_gptq_is_never_worse_than_nearest(seed: int, group_size: int) -> None:
    weight, hessian = _problem(seed)
    grid = fit_grid(weight, group_size)
    nearest = grid.quantize(weight)
    codes = no_worse(gptq(weight, grid, hessian), nearest, weight, grid, hessian)
    chosen, plain = (error(weight, grid.dequantize(each), hessian) for each in (codes, nearest))
    assert (chosen <= plain * (1 + 1e-5)).all()
    assert chosen.sum() < 0.8 * plain.sum()


def test_gptq_without_correlation_is_rounding_to_nearest() -> None:
    weight, _ = _problem(0)
    grid = fit_grid(weight, 64)
    hessian = torch.diag(torch.rand(128, dtype=torch.float64) + 0.1)
    assert torch.equal(gptq(weight, grid, hessian), grid.quantize(weight))


def test_gptq_of_two_columns_is_the_best_there_is() -> None:
    """Two columns carry everything: with the other codes fixed, all 256 pairs are tried."""
    weight, _ = _problem(3, rows=8, columns=64)
    hessian = torch.eye(64, dtype=torch.float64) * 1e-3
    hessian[:2, :2] = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
    grid = ChannelGrid.fit(weight)
    codes = gptq(weight, grid, hessian)
    found = error(weight, grid.dequantize(codes), hessian)
    best = torch.full_like(found, torch.inf)
    for first in range(16):
        for second in range(16):
            trial = grid.quantize(weight)
            trial[:, 0], trial[:, 1] = first, second
            best = torch.minimum(best, error(weight, grid.dequantize(trial), hessian))
    assert (found <= 1.5 * best + 1e-9).all() and torch.isclose(found, best).any()


def test_full_propagation_is_least_squares() -> None:
    weight, _ = _problem(1)
    exact = torch.randn(400, 128, dtype=torch.float64)
    served = exact + 0.3 * torch.randn(400, 128, dtype=torch.float64)
    moments = Moments.of([(exact, served, None)])
    fitted = propagated(weight.double(), moments, moments.hessian, 1.0)
    expected = torch.linalg.lstsq(served, exact @ weight.double().T).solution.T
    assert torch.allclose(fitted, expected, atol=1e-8)
    assert torch.equal(propagated(weight, moments, moments.hessian, 0.0), weight)


def test_moments_count_tokens_by_the_residual_they_are_added_to() -> None:
    x = torch.randn(6, 64)
    residual = torch.full((6, 8), 2.0)
    weighted = Moments.of([(x[:3], x[:3], residual[:3]), (x[3:], x[3:], residual[3:])])
    assert torch.allclose(weighted.hessian, (x.T @ x).double() / 4, atol=1e-5)
    assert weighted.cross is not None and not weighted.cross.any()


@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_searched_grid_loses_no_more_than_the_span(group_size: int) -> None:
    weight = torch.randn(64, 256)
    weight[::7, 3] *= 6
    importance = torch.rand(256) ** 4
    losses = [
        ((grid.dequantize(grid.quantize(weight)) - weight).square() @ importance)
        for grid in (search_grid(weight, group_size, importance), fit_grid(weight, group_size))
    ]
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all()
    assert losses[0].sum() < 0.95 * losses[1].sum()


def test_searched_grid_stays_within_eight_bits() -> None:
    weight = torch.randn(64, 256) * torch.exp(torch.randn(64, 256))
    grid = search_grid(weight, 64, torch.ones(256))
    assert isinstance(grid, GroupGrid)
    assert int(grid.group_scale.min()) >= 1 and int(grid.group_scale.max()) <= GROUP_SCALE_MAX
    assert int((grid.group_scale.int() * grid.group_zero.int()).max()) <= 128
    packed = grid.pack(grid.quantize(weight))
    assert torch.equal(packed.dequantize(), grid.dequantize(packed.codes()))


def test_every_code_a_grid_can_emit_stays_within_eight_bits() -> None:
    """All (q, s2, z): no product, sum or difference of either way to dequantize leaves a byte."""
    scale, zero = torch.meshgrid(
        torch.arange(1, GROUP_SCALE_MAX + 1), torch.arange(16), indexing="ij"
    )
    valid = zero * scale <= 128
    scale, zero = scale[valid], zero[valid]
    grid = GroupGrid(torch.ones(1).half(), scale[None].byte(), zero[None].byte(), 64)
    top = grid.max_code[0].int()
    codes = torch.arange(16)[:, None]
    allowed = codes <= top
    value = (codes - zero) * scale
    assert ((value >= -128) & (value <= 127))[allowed].all()
    assert (codes * scale <= 255)[allowed].all()
    offset = 128 - zero * scale
    fast = ((codes * scale + offset) % 256) ^ 0x80
    assert torch.equal(((fast + 128) % 256 - 128)[allowed], value[allowed])
    assert (((codes * scale + offset) >= 0) & ((codes * scale + offset) <= 255))[allowed].all()


SMALL: dict[str, Any] = {"sequences": 8, "length": 32}


def _quantize(
    source: WeightSource,
    directory: Path,
    recipe: Recipe,
    calibration: str | None = __file__,
    **options: Any,
) -> Path:
    small = replace(recipe, **SMALL)
    quantize(source, directory, small, calibration=calibration, console=QUIET, **options)
    return directory


def _bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_makes_a_checkpoint_that_loads(name: str, tmp_path: Path) -> None:
    source = tiny_source(tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True))
    quantized = open_source(str(_quantize(source, tmp_path / "model", RECIPES[name])))
    assert quantized.quantization is not None
    config = QuantizationConfig.from_json(quantized.quantization)
    recipe = find_recipe(name)
    assert (config.recipe, config.kv_bits, config.k_hadamard, config.activation_bits) == (
        name,
        recipe.kv_bits,
        recipe.k_hadamard,
        recipe.activation_bits,
    )
    assert config.group_size == (-1 if name in ("qoq-paper-channel", "smoothquant") else 64)
    assert load_decoder(quantized, torch.float32).config.num_layers == 2
    quantized.tokenizer()


def test_wide_linears_stay_at_eight_bits(tmp_path: Path) -> None:
    recipe = replace(RECIPES["rtn"], wide_linears=names.DOWN)
    present = open_source(str(_quantize(tiny_source(), tmp_path / "model", recipe))).names()
    assert "model.layers.1.mlp.down_proj.dequant_scale" in present
    assert "model.layers.1.self_attn.o_proj.qweight" in present


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


def test_served_layer_is_what_the_checkpoint_holds(tmp_path: Path) -> None:
    source = tiny_source()
    layer = read_layer(source, 0)
    x = [torch.randn(LENGTH, 128)]
    quantized, streams = _quantizer(source).quantize(layer, Streams(x, x))
    for linear, weight in quantized.weights.items():
        assert torch.equal(quantized.served[f"{linear}.weight"], weight.dequantize())
    expected = _quantizer(source).run_served(quantized.served, x)
    assert torch.allclose(streams.served[0], expected[0])
    assert torch.allclose(streams.exact[0], _quantizer(source).run_exact(layer, x)[0])


def test_center_is_the_mean_key_of_the_rounded_layer() -> None:
    source = tiny_source(tiny_config("Qwen3ForCausalLM", attention_bias=True))
    recipe = replace(UNROUNDED, k_center=True)
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


def _ruin_down(layer: Layer, *_: Any) -> Layer:
    """An exact pass that makes rounding hopeless: one channel of a thousand times the others."""
    up, down = "mlp.up_proj.weight", "mlp.down_proj.weight"
    factor = torch.ones(layer[up].shape[0])
    factor[::64] = 1e-3
    return {**layer, up: layer[up] * factor[:, None], down: layer[down] / factor}


def test_a_pass_that_makes_the_error_worse_is_left_out() -> None:
    source = tiny_source()
    x = [torch.randn(LENGTH, 128)]
    for guarded in (True, False):
        recipe = replace(RECIPES["rtn"], passes=(_ruin_down,), guarded=guarded)
        _, ruined = _quantizer(source, recipe).quantize(read_layer(source, 0), Streams(x, x))
        _, plain = _quantizer(source).quantize(read_layer(source, 0), Streams(x, x))
        assert (ruined.error > 1.2 * plain.error) == (not guarded)


def test_twice_with_one_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        _bytes(_quantize(tiny_source(), tmp_path / str(run), RECIPES["qoq"], seed=seed))
        for run, seed in enumerate((1, 1, 2))
    )
    assert first == second
    assert first.keys() == other.keys() and first != other


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_killed_and_resumed_gives_the_same_bytes(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tiny_config(num_hidden_layers=3))
    expected = _bytes(_quantize(source, tmp_path / "whole", RECIPES["quarot"]))
    write, calls = CheckpointWriter.write, []

    def killed(self: CheckpointWriter, shard: str, tensors: dict[str, Tensor]) -> None:
        if len(calls) == step:
            raise KeyboardInterrupt
        calls.append(shard)
        write(self, shard, tensors)

    monkeypatch.setattr(CheckpointWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        _quantize(source, tmp_path / "resumed", RECIPES["quarot"])
    assert not (tmp_path / "resumed").exists()
    written: list[str] = []

    def counted(self: CheckpointWriter, shard: str, tensors: dict[str, Tensor]) -> None:
        written.append(shard)
        write(self, shard, tensors)

    monkeypatch.setattr(CheckpointWriter, "write", counted)
    assert _bytes(_quantize(source, tmp_path / "resumed", RECIPES["quarot"])) == expected
    assert len(written) == 4 - step


def test_the_old_checkpoint_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _quantize(tiny_source(), tmp_path / "model", RECIPES["rtn"])
    before = _bytes(directory)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("qserve.formats.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        _quantize(tiny_source(), directory, RECIPES["quarot"])
    assert _bytes(directory) == before


def test_calibration_text_of_a_file_is_used(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 500)
    assert calibration_text(str(text)) == text.read_text()
    models = [
        _bytes(_quantize(tiny_source(), tmp_path / str(run), RECIPES["gptq"], calibration=origin))
        for run, origin in enumerate((None, str(text)))
    ]
    assert models[0]["model-00001.safetensors"] != models[1]["model-00001.safetensors"]


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    target, source = tmp_path / "model", tiny_source()
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(CalibrationError, match="9 tokens, 256 are needed"):
        _quantize(source, target, RECIPES["gptq"], calibration=str(short))
    with pytest.raises(RecipeError, match="'best'"):
        quantize(source, target, "best", console=QUIET)
    with pytest.raises(RecipeError, match="group size 128"):
        _quantize(source, target, RECIPES["rtn"], group_size=128)
    odd = tiny_source(tiny_config(intermediate_size=160))
    with pytest.raises(ModelError, match=r"mlp.gate_proj: sizes \(160, 128\)"):
        _quantize(odd, target, RECIPES["rtn"])
    done = open_source(str(_quantize(source, tmp_path / "done", RECIPES["rtn"])))
    with pytest.raises(ModelError, match="quantized already"):
        _quantize(done, target, RECIPES["rtn"])
    shutil.rmtree(tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
