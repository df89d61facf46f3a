"""Whole models: what recipes make of them, what they tell, and what they refuse."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from quant_helpers import QUIET, SMALL, SMALLEST, bytes_of, quantize_small
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from qserve.cli import main
from qserve.formats.checkpoint import QuantizationConfig
from qserve.models import names
from qserve.models.config import ModelError
from qserve.models.loader import load_decoder, read_weight
from qserve.models.source import WeightSource, open_source
from qserve.quant import calibrate
from qserve.quant.calibrate import (
    CalibrationError,
    Layer,
    calibration_text,
    calibration_windows,
    read_layer,
)
from qserve.quant.layer import LayerQuantizer, Streams
from qserve.quant.pipeline import Job, plan, quantize
from qserve.quant.recipe import RECIPES, Recipe, RecipeError, find_recipe
from qserve.quant.rotate import RotatedSource
from qserve.testing.tiny import (
    MemorySource,
    quantized_source,
    save_tiny_model,
    tiny_config,
    tiny_source,
    tiny_tokenizer,
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_bits", 3),
        ("kv_bits", 2),
        ("rotation", "Never"),
        ("grid", "serach"),
        ("rounding", "gtpq"),
        ("group_size", 32),
        ("sequences", 1),
    ],
)
def test_a_recipe_with_a_slip_is_refused(field: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"recipe 'mine': {field} .*{value}"):
        Recipe("mine", **{field: value})


def test_a_wide_linear_that_is_not_there_is_refused(tmp_path: Path) -> None:
    recipe = replace(RECIPES["rtn"], wide_linears=("mlp.down_proj", "mlp.dwn_proj"))
    with pytest.raises(RecipeError, match="named 'mlp\\.dwn_proj'"):
        quantize_small(tiny_source(), tmp_path / "model", recipe)


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


def test_calibration_text_of_a_file_is_used(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 500)
    assert calibration_text(str(text)) == text.read_text()
    models = [
        bytes_of(
            quantize_small(tiny_source(), tmp_path / str(run), RECIPES["gptq"], calibration=origin)
        )
        for run, origin in enumerate((None, str(text)))
    ]
    assert models[0]["model-00001.safetensors"] != models[1]["model-00001.safetensors"]


def test_calibration_windows_are_pieces_of_the_text_without_overlap() -> None:
    text = "".join(map(chr, torch.randint(32, 127, (1000,))))
    windows, again, other = (
        calibration_windows(tiny_tokenizer(), text, 7, 100, seed) for seed in (3, 3, 4)
    )
    assert windows.shape == (7, 100)
    starts = [text.index(tiny_tokenizer().decode(window)) for window in windows]
    assert len(set(starts)) == 7 and all(start % 100 == 0 for start in starts)
    assert torch.equal(windows, again) and not torch.equal(windows, other)
    with pytest.raises(CalibrationError, match="has 1000 tokens, 1100 are needed"):
        calibration_windows(tiny_tokenizer(), text, 11, 100, 0)


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
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    with pytest.raises(CalibrationError, match=r"script: .*scripts are no longer supported"):
        calibration_text(str(tmp_path / "script"))


@pytest.mark.parametrize("rotation", ["never", "always"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (names.EMBEDDING, torch.zeros(300, 128)),
        (names.LM_HEAD, torch.zeros(400, 128)),
        (names.FINAL_NORM, torch.ones(64)),
        ("model.layers.0.input_layernorm.weight", torch.ones(1)),
        ("model.layers.0.self_attn.q_proj.weight", torch.zeros(512, 128)),
        ("model.layers.0.mlp.down_proj.weight", torch.ones(128, 192, dtype=torch.int8)),
    ],
)
def test_tensors_that_are_not_what_config_says_are_refused(
    name: str, tensor: Tensor, rotation: Literal["never", "always"], tmp_path: Path
) -> None:
    source = tiny_source()
    source.tensors[name] = tensor
    with pytest.raises(ModelError, match=f"tensor {name} (has shape|is torch.int8)"):
        quantize_small(source, tmp_path / "model", replace(RECIPES["rtn"], rotation=rotation))
    assert not (tmp_path / "model").exists()


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    target, source = tmp_path / "model", tiny_source()
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(CalibrationError, match="9 tokens, 256 are needed"):
        quantize_small(source, target, RECIPES["gptq"], calibration=str(short))
    with pytest.raises(RecipeError, match="'best'"):
        quantize(source, target, "best", console=QUIET)
    with pytest.raises(RecipeError, match=r"128 does not divide the 192 inputs of mlp\.down_proj"):
        quantize_small(source, target, RECIPES["rtn"], group_size=128)
    with pytest.raises(RecipeError, match="group size 32 is none of -1, 64, 128"):
        quantize_small(source, target, RECIPES["rtn"], group_size=32)
    odd = tiny_source(tiny_config(intermediate_size=160))
    with pytest.raises(ModelError, match=r"mlp.gate_proj: sizes \(160, 128\)"):
        quantize_small(odd, target, RECIPES["rtn"])
    done = open_source(str(quantize_small(source, tmp_path / "done", RECIPES["rtn"])))
    with pytest.raises(ModelError, match="quantized already"):
        quantize_small(done, target, RECIPES["rtn"])
    shutil.rmtree(tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
