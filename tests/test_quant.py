"""Whole layers and models: what is quantized is what is served, and the same bytes every time."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from qserve.cli import main
from qserve.formats.checkpoint import CheckpointWriter, QuantizationConfig
from qserve.models import names
from qserve.models.attention import DenseAttention
from qserve.models.config import ModelError
from qserve.models.loader import load_decoder
from qserve.models.rope import rope_table
from qserve.models.source import WeightSource, open_source
from qserve.quant import calibrate, pipeline
from qserve.quant.calibrate import (
    CalibrationError,
    Layer,
    PausedLayer,
    calibration_text,
    fused_bias,
    fused_weight,
    read_layer,
)
from qserve.quant.layer import LayerQuantizer, Streams
from qserve.quant.linear import LinearQuantizer
from qserve.quant.pipeline import quantize
from qserve.quant.recipe import RECIPES, Recipe, RecipeError, find_recipe
from qserve.testing.tiny import MemorySource, save_tiny_model, tiny_config, tiny_source

LENGTH = 16
QUIET = Console(quiet=True)


def _quantizer(source: WeightSource, recipe: Recipe = RECIPES["rtn"]) -> LayerQuantizer:
    return LayerQuantizer(source.config, recipe, 64, LENGTH)


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


@pytest.mark.parametrize(
    ("pattern", "wide"),
    [
        ("mlp.down_proj", {"0.mlp.down_proj", "1.mlp.down_proj"}),
        ("model.layers.1.self_attn.o_*", {"1.self_attn.o_proj"}),
        ("model.layers.0.*.v_proj", {f"0.self_attn.{part}_proj" for part in "qkv"}),
    ],
)
def test_wide_linears_stay_at_eight_bits(pattern: str, wide: set[str], tmp_path: Path) -> None:
    recipe = replace(RECIPES["qoq"], wide_linears=(pattern,))
    quantized = open_source(str(_quantize(tiny_source(), tmp_path / "model", recipe)))
    ends = (".dequant_scale", ".qweight")
    found = [
        {
            n.removeprefix("model.layers.").removesuffix(end)
            for n in quantized.names()
            if n.endswith(end)
        }
        for end in ends
    ]
    assert found[0] == wide and len(found[1]) == 14 - len(wide)
    assert load_decoder(quantized, torch.float32).config.num_layers == 2


def test_a_wide_linear_that_is_not_there_is_refused(tmp_path: Path) -> None:
    recipe = replace(RECIPES["rtn"], wide_linears=("mlp.down_proj", "mlp.dwn_proj"))
    with pytest.raises(RecipeError, match="named 'mlp\\.dwn_proj'"):
        _quantize(tiny_source(), tmp_path / "model", recipe)


def test_wide_linears_of_the_command_line(tmp_path: Path) -> None:
    model, output = save_tiny_model(tmp_path / "model"), tmp_path / "quantized"
    command = ["quantize", str(model), "-o", str(output), "--recipe", "rtn", "--wide"]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "mlp.down_proj", "--wide", "model.layers.0.self_attn.*"])
    present = open_source(str(output)).names()
    assert "model.layers.1.mlp.down_proj.dequant_scale" in present
    assert "model.layers.0.self_attn.q_proj.dequant_scale" in present
    assert "model.layers.1.self_attn.q_proj.qweight" in present
    with pytest.raises(SystemExit, match="no linear of the model is named 'lm_head'"):
        main([*command, "lm_head"])


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


STEPS: dict[str, tuple[type, str]] = {
    "trial": (pipeline.Job, "_trial_error"),
    "layer": (LayerQuantizer, "quantize"),
    "passes": (LayerQuantizer, "_prepared"),
    "linear": (LinearQuantizer, "quantize"),
    "shard": (CheckpointWriter, "write"),
    "state": (CheckpointWriter, "save_state"),
    "commit": (CheckpointWriter, "commit"),
}
SMALLEST = tiny_config(
    hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64
)


def _count(step: str, patch: pytest.MonkeyPatch, last: float = math.inf) -> list[str]:
    """Note every call of a step from now on; that after `last` of them is interrupted."""
    owner, name = STEPS[step]
    original, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(step)
        return original(*arguments, **options)

    patch.setattr(owner, name, counted)
    return calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, int]]:
    """A checkpoint's bytes, and how often each step was taken to make it."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    with pytest.MonkeyPatch.context() as patch:
        calls = {step: _count(step, patch) for step in STEPS}
        made = _bytes(_quantize(tiny_source(SMALLEST), directory, RECIPES["qoq"]))
    return made, {step: len(each) for step, each in calls.items()}


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_and_resumed_gives_the_same_bytes(
    step: str,
    share: float,
    whole: tuple[dict[str, bytes], dict[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, steps = whole
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _count(step, patch, last=int(share * steps[step]))
        _quantize(tiny_source(SMALLEST), tmp_path / "model", RECIPES["qoq"])
    assert not (tmp_path / "model").exists()
    assert _bytes(_quantize(tiny_source(SMALLEST), tmp_path / "model", RECIPES["qoq"])) == expected


def test_a_resumed_run_writes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _count("state", patch, last=1)
        _quantize(tiny_source(SMALLEST), tmp_path / "model", RECIPES["quarot"])
    written = _count("shard", monkeypatch)
    layers = _count("layer", monkeypatch)
    _quantize(tiny_source(SMALLEST), tmp_path / "model", RECIPES["quarot"])
    assert (len(written), len(layers)) == (1, 1)


@pytest.mark.gpu
def test_on_a_gpu_activations_may_wait_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = _bytes(_quantize(tiny_source(), tmp_path / "a", RECIPES["qoq"], device="cuda"))
    monkeypatch.setattr(pipeline, "_RESIDENT_BYTES", 0)
    waiting = _bytes(_quantize(tiny_source(), tmp_path / "b", RECIPES["qoq"], device="cuda"))
    assert waiting == resident


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


def test_calibration_text_of_a_data_set_is_its_training_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"number {index}"} for index in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text('{"text": "unseen"}')
    expected = [row["text"] for row in rows]
    assert calibration_text(str(tmp_path)).split("\n\n") == expected
    monkeypatch.setattr(calibrate, "_DATASET_CHARACTERS", 2 * len("number 0"))
    assert calibration_text(str(tmp_path)).split("\n\n") == expected[:3]


def test_calibration_text_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"latin: not UTF-8 text at byte 2"):
        calibration_text(str(tmp_path / "latin"))
    with pytest.raises(CalibrationError, match=r"no-such: no such file or data set"):
        calibration_text(str(tmp_path / "no-such"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"words": "not under this name"}')
    with pytest.raises(CalibrationError, match=r"set: a data set without a column 'text'"):
        calibration_text(str(tmp_path / "set"))


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
