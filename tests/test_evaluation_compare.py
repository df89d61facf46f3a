"""Recipes compared: numbers are those of the single commands, and what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from qserve.cli import main
from qserve.config import EngineConfig
from qserve.evaluation import compare as module
from qserve.evaluation.compare import Comparison, Row, Study, compare
from qserve.evaluation.perplexity import measure_perplexity
from qserve.evaluation.plot import comparison_figure
from qserve.evaluation.report import comparison_lines, write_comparison
from qserve.evaluation.sequences import EvaluatedModel
from qserve.models.config import ModelError
from qserve.quant.recipe import Recipe
from qserve.testing.tiny import MemorySource, save_tiny_model, tiny_source

TEXT = "The quick brown fox jumps over the lazy dog; äöü. " * 12
SHORT = {"rounding": "nearest", "sequences": 4, "length": 64}
DEFAULTS: dict[str, str] = {}
NEAREST = Recipe("nearest", **SHORT)  # type: ignore[arg-type]
ROTATED = Recipe("rotated", rotation="always", k_hadamard=True, **SHORT)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return tiny_source()


@pytest.fixture(scope="module", autouse=True)
def _calibration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A short text: the tiny tokenizer takes seconds over the one that comes with Python."""
    path = tmp_path_factory.mktemp("calibration") / "text"
    path.write_text(TEXT)
    with patch.dict(DEFAULTS, calibration=str(path)):
        yield


def study(source: MemorySource, /, **changes: object) -> Study:
    basis = Study(source, [NEAREST], TEXT, window_length=100, group_size=64, **DEFAULTS)  # type: ignore
    return replace(basis, **changes)  # type: ignore[arg-type]


@pytest.fixture
def work() -> Iterator[list[str]]:
    """What is done while the test runs."""
    done: list[str] = []

    def watched(name: str) -> object:
        function = getattr(module, name)

        def call(*arguments: object, **settings: object) -> object:
            done.append(name)
            return function(*arguments, **settings)

        return patch.object(module, name, call)

    names = ("quantize", "measure_perplexity", "diff_models")
    with watched(names[0]), watched(names[1]), watched(names[2]):  # type: ignore[attr-defined]
        yield done


def test_numbers_are_those_of_single_measurements(source: MemorySource, tmp_path: Path) -> None:
    result = compare(
        study(source, recipes=[NEAREST, ROTATED], kv_bits=(None, 16), activation_bits=(8, 16)),
        tmp_path,
    )
    unquantized = EvaluatedModel.open(source, EngineConfig()).model
    assert result.unquantized == measure_perplexity(unquantized, TEXT, 100).perplexity
    assert [(row.recipe, row.kv_bits, row.activation_bits) for row in result.rows] == [
        (recipe, kv, activations)
        for recipe in ("nearest", "rotated")
        for kv in (4, 16)
        for activations in (8, 16)
    ]
    for row in result.rows:
        (checkpoint,) = (tmp_path / "checkpoints").glob(f"{row.recipe}-g64-seed0-*")
        config = EngineConfig(kv_bits=row.kv_bits, activation_bits=row.activation_bits)
        evaluated = EvaluatedModel.open(checkpoint, config)
        assert row.perplexity == measure_perplexity(evaluated.model, TEXT, 100).perplexity
        assert row.bytes == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        assert row.bytes < result.unquantized_bytes
        assert len(row.output_sqnr_db) == 2 and row.kl_divergence > 0
    assert len({row.perplexity for row in result.rows}) == 8


def test_rows_say_what_the_weights_are(source: MemorySource, tmp_path: Path) -> None:
    recipes = [NEAREST, replace(NEAREST, name="wide", weight_bits=8)]
    rows = compare(study(source, recipes=recipes), tmp_path).rows
    assert [(row.weight_bits, row.group_size) for row in rows] == [(4, 64), (8, -1)]


def test_what_is_done_is_not_done_again(
    source: MemorySource, tmp_path: Path, work: list[str]
) -> None:
    first = compare(study(source), tmp_path)
    assert work == ["measure_perplexity", "quantize", "diff_models", "measure_perplexity"]
    work.clear()
    assert compare(study(source), tmp_path) == first and work == []
    both = compare(study(source, kv_bits=(None, 16)), tmp_path)
    assert work == ["measure_perplexity"] and both.rows[0] == first.rows[0]


def test_seeds_are_for_recipes_that_are_calibrated(
    source: MemorySource, tmp_path: Path, work: list[str]
) -> None:
    fitted = replace(NEAREST, name="fitted", rounding="gptq")
    result = compare(study(source, recipes=[NEAREST, fitted], seeds=(0, 1)), tmp_path)
    assert [(row.recipe, row.seed) for row in result.rows] == [
        ("nearest", 0),
        ("fitted", 0),
        ("fitted", 1),
    ]
    assert result.rows[1].perplexity != result.rows[2].perplexity
    work.clear()
    again = compare(study(source, recipes=[fitted], seeds=(1, 2)), tmp_path)
    assert work == ["quantize", "diff_models", "measure_perplexity"]
    assert again.rows[0] == result.rows[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"recipes": [replace(NEAREST, k_hadamard=True)]},
        {"group_size": -1},
        {"source": tiny_source(seed=1)},
    ],
    ids=["recipe", "group size", "model"],
)
def test_another_study_shares_nothing(
    source: MemorySource, tmp_path: Path, work: list[str], changes: dict[str, object]
) -> None:
    first = compare(study(source), tmp_path)
    work.clear()
    assert compare(study(source, **changes), tmp_path).rows != first.rows
    assert "quantize" in work


@pytest.mark.parametrize(
    "changes",
    [{"text": TEXT.upper()}, {"text": TEXT[:200]}, {"window_length": 64}, {"max_windows": 2}],
    ids=str,
)
def test_another_text_needs_no_other_checkpoint(
    source: MemorySource, tmp_path: Path, work: list[str], changes: dict[str, object]
) -> None:
    compare(study(source), tmp_path)
    work.clear()
    compare(study(source, **changes), tmp_path)
    assert work == ["measure_perplexity", "diff_models", "measure_perplexity"]


def test_other_calibration_text_needs_another_checkpoint(
    source: MemorySource, tmp_path: Path, work: list[str]
) -> None:
    fitted = replace(NEAREST, rounding="gptq")
    first = compare(study(source, recipes=[fitted]), tmp_path)
    work.clear()
    (tmp_path / "other").write_text(TEXT.upper())
    other = compare(study(source, recipes=[fitted], calibration=str(tmp_path / "other")), tmp_path)
    assert work == ["quantize", "diff_models", "measure_perplexity"]
    assert other.rows[0].perplexity != first.rows[0].perplexity


def test_goes_on_where_it_was_stopped(
    source: MemorySource, tmp_path: Path, work: list[str]
) -> None:
    expected = compare(study(source), tmp_path / "undisturbed")
    stop = patch.object(module, "diff_models", side_effect=KeyboardInterrupt)
    with stop, pytest.raises(KeyboardInterrupt):
        compare(study(source), tmp_path / "stopped")
    work.clear()
    assert compare(study(source), tmp_path / "stopped") == expected
    assert work == ["diff_models", "measure_perplexity"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 128}, "group size 128 does not divide"),
        ({"text": "short"}, "less than one window"),
        ({"calibration": "/nowhere/text"}, "/nowhere/text: no such file"),
        ({"recipes": [NEAREST, replace(NEAREST, sequences=99)]}, "6336 are needed"),
        ({"recipes": [replace(NEAREST, wide_linears=("lm_head",))]}, "named 'lm_head'"),
        ({"kv_bits": (4, 5)}, "kv_bits must be 4, 8 or 16, got 5"),
        ({"activation_bits": (4,)}, "activation_bits must be 8 or 16, got 4"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
    ],
    ids=lambda each: each if isinstance(each, str) else next(iter(each)),
)
def test_bad_studies_are_refused_before_any_work(
    source: MemorySource,
    tmp_path: Path,
    work: list[str],
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(study(source, **changes), tmp_path)
    assert work == [] and not list(tmp_path.iterdir())


def test_a_quantized_model_is_refused_before_any_work(
    source: MemorySource, tmp_path: Path, work: list[str]
) -> None:
    quantization = NEAREST.quantization(64).to_json()
    done = MemorySource({**source.hf_config, "quantization_config": quantization}, source.tensors)
    with pytest.raises(ModelError, match="quantized already"):
        compare(study(done), tmp_path)
    assert work == []


def rows() -> list[Row]:
    common = {
        "weight_bits": 4,
        "group_size": 64,
        "kv_bits": 4,
        "activation_bits": 8,
        "bytes": 90_500_000,
    }
    common |= {"kl_divergence": 0.25, "top1_agreement": 0.75, "output_sqnr_db": (20.0, 15.0)}
    values = [("rtn", 0, 33.0), ("qoq", 0, 27.0), ("qoq", 1, 28.0)]
    return [Row(name, seed, perplexity=value, **common) for name, seed, value in values]  # type: ignore


def test_table_and_files(tmp_path: Path) -> None:
    comparison = Comparison(24552, 23.5, 270_000_000, rows())
    lines = list(comparison_lines(comparison))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    formats, quality = ["4", "64", "8", "4"], ["90.5", "0.2500", "75.00%"]
    assert cells[2:] == [
        ["unquantized", "16", "", "16", "16", "23.500", "", "270.0", "", ""],
        ["qoq", *formats, "27.500 (27.000 - 28.000)", "+4.000", *quality],
        ["rtn", *formats, "33.000", "+9.500", *quality],
    ]
    assert len({len(line) for line in lines if "|" in line}) == 1, "columns align"
    write_comparison(comparison, tmp_path)
    assert (tmp_path / "comparison.md").read_text().splitlines() == lines
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["perplexity"] for row in stored["rows"]] == [33.0, 27.0, 28.0]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_perplexity_against_bytes_and_the_stream_by_layer() -> None:
    sizes, layers = comparison_figure(Comparison(24552, 23.5, 270_000_000, rows())).axes
    (star,) = [line for line in sizes.lines if line.get_label() == "unquantized"]
    assert star.get_xydata().tolist() == [[270.0, 23.5]]
    points = {each.get_label(): each.lines[0].get_xydata().tolist() for each in sizes.containers}
    assert points == {"rtn A8 KV4": [[90.5, 33.0]], "qoq A8 KV4": [[90.5, 27.5]]}
    (bar,) = sizes.containers[1].lines[2][0].get_segments()
    assert bar.tolist() == [[90.5, 27.0], [90.5, 28.0]]
    lines = {line.get_label(): line.get_ydata().tolist() for line in layers.lines}
    assert lines == {"rtn": [20.0, 15.0], "qoq": [20.0, 15.0]}
    assert (sizes.get_xlabel(), sizes.get_ylabel()) == ("weights, MB", "perplexity")
    assert layers.get_xlabel() == "layer" and layers.get_ylabel().endswith("dB")


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, text, output = save_tiny_model(tmp_path / "m"), tmp_path / "t", tmp_path / "out"
    text.write_text(TEXT * 30)
    command = (
        f"evaluate compare {model} --recipes rtn -o {output} --text {text} --seq-len 100".split()
    )
    command += f"--calibration {text} --max-windows 6 --group-size 64 --kv 4,16".split()
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert not exit_.value.code
    assert capsys.readouterr().out == (output / "comparison.md").read_text()
    stored = json.loads((output / "comparison.json").read_text())
    assert [row["kv_bits"] for row in stored["rows"]] == [4, 16]
    for wrong, message in (
        (["--kv", "4,x"], "--kv '4,x' is not"),
        (["--recipes", "?"], "no recipe"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*command, *wrong])
        assert message in str(exit_.value.code)
