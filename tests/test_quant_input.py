"""What quantize is given: calibration text, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from quant_helpers import QUIET, bytes_of, quantize_small
from torch import Tensor

from qserve.models import names
from qserve.models.config import ModelError
from qserve.models.source import open_source
from qserve.quant import calibrate
from qserve.quant.calibrate import CalibrationError, calibration_text, calibration_windows
from qserve.quant.pipeline import quantize
from qserve.quant.recipe import RECIPES, Recipe, RecipeError
from qserve.testing.tiny import tiny_config, tiny_source, tiny_tokenizer


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


@pytest.mark.parametrize("rotation", ["never", "always"])
@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.layers.1.mlp.down_proj.weight", math.nan, "float32"),
        ("model.layers.0.self_attn.v_proj.weight", math.inf, "float32"),
        (names.EMBEDDING, -math.inf, "float16"),
        (names.LM_HEAD, 1e9, "float16"),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    name: str, value: float, dtype: str, rotation: Literal["never", "always"], tmp_path: Path
) -> None:
    """Or would not be, once stored in half precision."""
    source = tiny_source()
    source.tensors[name][3, 5] = value
    with pytest.raises(ModelError, match=f"tensor {name} is not finite in torch.{dtype}"):
        quantize_small(
            source, tmp_path / "model", replace(RECIPES["smoothquant"], rotation=rotation)
        )


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
