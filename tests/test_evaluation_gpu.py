"""Evaluation on a GPU gives what the CPU's exact ops give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qserve.config import EngineConfig
from qserve.evaluation.compare import Study, compare
from qserve.evaluation.diff import diff_models
from qserve.evaluation.perplexity import measure_perplexity
from qserve.evaluation.sequences import EvaluatedModel
from qserve.evaluation.text import text_windows
from qserve.quant.pipeline import quantize
from qserve.quant.recipe import Recipe
from qserve.testing.tiny import MemorySource, tiny_config, tiny_source

pytestmark = pytest.mark.gpu

TEXT = "The quick brown fox jumps over the lazy dog; äöü. " * 40
W4A8KV4 = Recipe("test", k_hadamard=True, k_center=True, rounding="nearest", sequences=4, length=64)


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return tiny_source(tiny_config(hidden_size=256, intermediate_size=512, dtype="float16"))


@pytest.fixture(scope="module")
def checkpoint(source: MemorySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantized")
    (directory / "text").write_text(TEXT)
    quantize(source, directory / "model", W4A8KV4, 64, str(directory / "text"))
    return directory / "model"


def perplexity(model: Path | MemorySource, **settings: object) -> float:
    evaluated = EvaluatedModel.open(model, EngineConfig(**settings))  # type: ignore[arg-type]
    return measure_perplexity(evaluated.model, TEXT, 200).perplexity


@pytest.mark.parametrize(("kv_bits", "activation_bits"), [(4, 8), (16, 8), (4, 16)])
def test_quantized(checkpoint: Path, kv_bits: int, activation_bits: int) -> None:
    """Both in float16: the CPU in float32 is 0.7 % away from itself, at 8 and 4 bits."""
    settings = {"kv_bits": kv_bits, "activation_bits": activation_bits, "dtype": "float16"}
    expected = perplexity(checkpoint, device="cpu", **settings)
    assert perplexity(checkpoint, device="cuda", **settings) == pytest.approx(expected, rel=5e-3)


def test_unquantized(source: MemorySource) -> None:
    expected = perplexity(source, device="cpu")
    assert perplexity(source, device="cuda") == pytest.approx(expected, rel=2e-3)


def test_diff(source: MemorySource, checkpoint: Path) -> None:
    results = []
    for device in ("cpu", "cuda"):
        config = EngineConfig(device=device)
        original, quantized = (EvaluatedModel.open(m, config) for m in (source, checkpoint))
        windows = text_windows(original.model.tokenizer, TEXT, 200, 3)
        results.append(diff_models(original, quantized, windows))
    cpu, cuda = results
    assert cuda.kl_divergence == pytest.approx(cpu.kl_divergence, rel=0.1)
    for expected, layer in zip(cpu.layers, cuda.layers, strict=True):
        assert layer.output.sqnr_db == pytest.approx(expected.output.sqnr_db, abs=0.3)
        assert layer.weights["mlp.up_proj"].sqnr_db == pytest.approx(
            expected.weights["mlp.up_proj"].sqnr_db, abs=0.01
        )


def test_compare(source: MemorySource, tmp_path: Path) -> None:
    """Quantized, evaluated and compared on the GPU; evaluated again on the CPU."""
    (tmp_path / "text").write_text(TEXT)
    calibration = str(tmp_path / "text")
    recipes = [W4A8KV4, replace(W4A8KV4, name="fitted", rounding="gptq", rotation="measured")]
    study = Study(source, recipes, TEXT, 200, calibration=calibration, device="cuda")
    result = compare(study, tmp_path / "out")
    assert result.unquantized == pytest.approx(perplexity(source, device="cpu"), rel=2e-3)
    assert [row.recipe for row in result.rows] == ["test", "fitted"]
    for row in result.rows:
        (checkpoint,) = (tmp_path / "out" / "checkpoints").glob(f"{row.recipe}-*")
        expected = perplexity(checkpoint, device="cpu")
        assert row.perplexity == pytest.approx(expected, rel=5e-3)
        assert row.kl_divergence > 0 and min(row.output_sqnr_db) > 5
