"""Whole models: what recipes make of them, and what they tell."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_helpers import SMALL, SMALLEST, bytes_of, quantize_small
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from qserve.cli import main
from qserve.formats.checkpoint import QuantizationConfig
from qserve.models import names
from qserve.models.loader import load_decoder, read_weight
from qserve.models.source import WeightSource, open_source
from qserve.quant.calibrate import (
    Layer,
    read_layer,
)
from qserve.quant.layer import LayerQuantizer, Streams
from qserve.quant.pipeline import Job, plan, quantize
from qserve.quant.recipe import RECIPES, Recipe, find_recipe
from qserve.quant.rotate import RotatedSource
from qserve.quant.smooth import RotateValues
from qserve.testing.tiny import (
    MemorySource,
    quantized_source,
    save_tiny_model,
    tiny_config,
    tiny_source,
)

ACCURACY = Path(__file__).parent.parent / "docs" / "accuracy.md"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_makes_a_checkpoint_that_loads(name: str, tmp_path: Path) -> None:
    source = tiny_source(tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True))
    quantized = open_source(str(quantize_small(source, tmp_path / "model", RECIPES[name])))
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
    embedding = source.tensor(names.EMBEDDING).half()
    is_rotated = not torch.equal(quantized.tensor(names.EMBEDDING), embedding)
    assert recipe.rotation == "measured" or is_rotated == (recipe.rotation == "always")
    assert load_decoder(quantized, torch.float32).config.num_layers == 2
    quantized.tokenizer()


@pytest.mark.parametrize(
    ("changes", "is_calibrated"),
    [
        ({}, False),
        ({"rotation": "always", "k_hadamard": True}, False),
        ({"rotation": "measured"}, True),
        ({"k_center": True}, True),
        ({"grid": "search"}, True),
        ({"propagation": 0.5}, True),
        ({"passes": (RotateValues(),)}, True),
    ],
    ids=str,
)
def test_a_recipe_knows_whether_calibration_changes_anything(
    changes: dict[str, Any], is_calibrated: bool, tmp_path: Path
) -> None:
    """Where it says no, other windows give the same bytes."""
    recipe = replace(RECIPES["rtn"], **changes)
    assert recipe.is_calibrated == is_calibrated
    if not is_calibrated:
        made = [
            bytes_of(quantize_small(tiny_source(), tmp_path / str(seed), recipe, seed=seed))
            for seed in (0, 1)
        ]
        assert made[0] == made[1]


@pytest.mark.parametrize(
    ("stored", "kept"),
    [("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")],
)
def test_what_is_not_quantized_keeps_its_dtype_or_has_half_precision(
    stored: str, kept: str, tmp_path: Path
) -> None:
    source = tiny_source(tiny_config(dtype=stored))
    quantized = open_source(str(quantize_small(source, tmp_path / "model", RECIPES["rtn"])))
    assert quantized.config.dtype == getattr(torch, kept)
    for name in (names.EMBEDDING, names.LM_HEAD, "model.layers.1.input_layernorm.weight"):
        assert quantized.tensor(name).dtype == getattr(torch, kept)


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
    quantized = open_source(str(quantize_small(tiny_source(), tmp_path / "model", recipe)))
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


def test_the_documented_recipe_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", ACCURACY.read_text(), re.DOTALL)
    (tmp_path / "notes.txt").write_text("Strengths by hand, or searched. " * 300)
    save_tiny_model(tmp_path / "original", SMALLEST)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("smollm2-135m", "original"), {})
    quantized = open_source("model")
    assert quantized.quantization is not None
    assert QuantizationConfig.from_json(quantized.quantization).recipe == "mine"
    assert "model.layers.0.mlp.down_proj.dequant_scale" in quantized.names()


def _told(source: WeightSource, directory: Path, recipe: Recipe) -> str:
    """What a terminal shows while a model is quantized."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    text = directory.with_name("text.txt")
    text.write_text("".join(map(chr, torch.randint(32, 127, (1000,)))))
    small = replace(recipe, **SMALL)
    quantize(source, directory, small, calibration=str(text), console=console)
    return re.sub(r"\x1b\[[\d;?]*\w", "", shown.getvalue())


def test_progress_shows_layers_and_the_time_left(tmp_path: Path) -> None:
    shown = _told(tiny_source(), tmp_path / "model", RECIPES["rtn"])
    assert re.search(r"Quantizing layers \S+ 0/2 -:--:--", shown)
    assert re.search(r"Quantizing layers, error 0\.\d+ \S+ 2/2 \d:\d\d:\d\d", shown)


def _on_a_grid(source: MemorySource) -> MemorySource:
    """Weights that 4 bits hold as they are, but in no other basis."""
    rounded = quantized_source(source, lambda _: 4)
    linears = [name.removesuffix(".qweight") for name in rounded.names() if "qweight" in name]
    weights = {f"{linear}.weight": read_weight(rounded, linear).dequantize() for linear in linears}
    return MemorySource(source.hf_config, source.tensors | weights)


def _with_outliers(source: MemorySource) -> MemorySource:
    """One channel of the residual stream twenty times louder than the others, as norms give it."""
    loud = {
        name: torch.where(torch.arange(128) == 5, 20.0, tensor)
        for name, tensor in source.tensors.items()
        if name.endswith("layernorm.weight")
    }
    return MemorySource(source.hf_config, source.tensors | loud)


@pytest.mark.parametrize("rotates", [False, True])
def test_rotation_is_decided_by_trial_and_told(rotates: bool, tmp_path: Path) -> None:
    source = _with_outliers(tiny_source()) if rotates else _on_a_grid(tiny_source())
    recipe = replace(RECIPES["rtn"], rotation="measured", kv_bits=16)
    shown = _told(source, tmp_path / "model", recipe)
    found = re.search(r"layers: (\S+) as they are, (\S+) rotated: (.*)rotating the residual", shown)
    assert found is not None
    assert (float(found[2]) < 0.9 * float(found[1])) == rotates
    assert found[3] == ("" if rotates else "not ")
    embedding = open_source(str(tmp_path / "model")).tensor(names.EMBEDDING)
    assert torch.equal(embedding, source.tensor(names.EMBEDDING).half()) == (not rotates)


def test_a_trial_is_judged_by_text_it_was_not_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[Tensor] = []
    judged: list[Tensor] = []
    quantize_layer, run_served = LayerQuantizer.quantize, LayerQuantizer.run_served

    def quantize_noted(self: LayerQuantizer, layer: Layer, streams: Streams) -> Any:
        fitted.extend((*streams.exact, *streams.served))
        return quantize_layer(self, layer, streams)

    def run_noted(self: LayerQuantizer, layer: Layer, batches: list[Tensor]) -> list[Tensor]:
        judged.extend(batches)
        return run_served(self, layer, batches)

    monkeypatch.setattr(LayerQuantizer, "quantize", quantize_noted)
    monkeypatch.setattr(LayerQuantizer, "run_served", run_noted)
    source = tiny_source()
    job = plan(source, replace(RECIPES["rtn"], **SMALL), 64, __file__)
    assert job._trial_error(read_layer(source, 0), list(torch.randn(4, 32, 128))) > 0
    assert len(fitted) == 6 and len(judged) == 1
    assert not any(torch.equal(judged[0], each) for each in fitted)


def test_a_rotation_is_tried_on_what_reaches_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Tensor] = []

    def note(_: Job, layer: Layer, batches: list[Tensor]) -> float:
        tried.append(torch.cat(batches))
        return float(len(tried))

    monkeypatch.setattr(Job, "_trial_error", note)
    source = tiny_source(tiny_config(num_hidden_layers=3))
    job = plan(source, replace(RECIPES["rtn"], **SMALL), 64, __file__)
    rotated = RotatedSource(source)
    assert job._trial_errors(rotated, Progress(disable=True)) == (1.0 + 3.0, 2.0 + 4.0)
    batches = job._embed(source)[:4]
    for index, (plain, turned) in enumerate((tried[:2], tried[2:])):
        batches = job._quantizer().run_exact(read_layer(source, index), batches)
        torch.testing.assert_close(plain, torch.cat(batches))
        torch.testing.assert_close(turned, plain @ rotated.rotation.float())


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


def test_seed_of_the_command_line_chooses_windows(tmp_path: Path) -> None:
    model, made = save_tiny_model(tmp_path / "model"), []
    for run, seed in enumerate(("1", "1", "2")):
        output = tmp_path / str(run)
        with pytest.raises(SystemExit, match="0"):
            main(["quantize", str(model), "-o", str(output), "--recipe", "gptq", "--seed", seed])
        made.append(bytes_of(output)["model-00001.safetensors"])
    assert made[0] == made[1] != made[2]
