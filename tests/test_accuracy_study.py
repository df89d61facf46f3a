"""The accuracy study: its noise, its rows through a tiny model, its tables."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_helpers import write_gguf

from qserve.config import EngineConfig
from qserve.engine.loading import load_model
from qserve.evaluation.sequences import SequenceScorer
from qserve.models import names
from qserve.models.source import open_source
from qserve.testing.tiny import save_tiny_model, tiny_source

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture(autouse=True)
def _import_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.startswith("accuracy_")]:
        del sys.modules[name]


def _study(tmp_path: Path, **options: Any) -> Any:
    from accuracy_study import Study

    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    defaults = {
        "model": str(save_tiny_model(tmp_path / "model")),
        "text": str(text),
        "in_domain": str(text),
        "own_text": None,
        "sections": ["methods", "texts"],
        "seeds": 2,
        "dither": [],
        "windows": 2,
        "length": 96,
        "device": "cpu",
        "seconds": math.inf,
    }
    return Study(argparse.Namespace(**{**defaults, **options}))


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(gguf.GGMLQuantizationType.Q4_1, 15), (gguf.GGMLQuantizationType.Q8_0, 254)],
)
def test_noise_stays_within_half_a_step_and_follows_its_seed(
    kind: gguf.GGMLQuantizationType, steps: int, tmp_path: Path
) -> None:
    from accuracy_sources import dithered_source

    original, name = tiny_source(), "model.layers.0.mlp.down_proj.weight"
    weight = original.tensor(name)
    path = write_gguf(tmp_path / "model.gguf", original, "llama", {name: kind})
    source = open_source(str(path))
    first, second, again = (dithered_source(source, seed).tensor(name) for seed in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    blocks = weight.reshape(-1, 32)
    span = blocks.amax(dim=1) - blocks.amin(dim=1) if steps == 15 else 2 * blocks.abs().amax(dim=1)
    noise = (first - source.tensor(name)).reshape(-1, 32).abs().amax(dim=1)
    ratio = noise / (span / steps)
    assert ratio.max() <= 0.51 and ratio.median() > 0.45
    plain = dithered_source(source, 1).tensor(names.EMBEDDING)
    assert torch.equal(plain, source.tensor(names.EMBEDDING))


def test_rows_are_measured_as_evaluation_measures_them(tmp_path: Path) -> None:
    from accuracy_rows import QOQ, Row
    from accuracy_study import Job
    from accuracy_table import tables

    study = _study(tmp_path)
    small = replace(QOQ, sequences=4, length=32, rotation="never")
    results = [
        study.measure(Job(None, 0, None)),
        *(study.measure(Job(Row("methods", "qoq", small), seed, None)) for seed in (0, 1)),
    ]
    plain = load_model(open_source(study.options.model), EngineConfig(kv_bits=16))
    logprobs = torch.cat([s.logprobs for s in SequenceScorer(plain).score(study._windows)])
    assert results[0]["perplexity"]["W"] == pytest.approx(math.exp(-logprobs.mean()), rel=1e-6)
    assert list(results[1]["perplexity"]) == ["W", "A8", "KV8", "KV4"]
    assert results[1]["perplexity"] != results[2]["perplexity"]
    lines = tables(results).splitlines()
    assert lines[0].startswith("Unquantized: ") and lines[-2].startswith("| qoq | ")
    assert "-" in lines[-2].split("|")[2] and lines[-2].split("|")[-3].strip() == "2"


def test_what_prompts_attend_to(tmp_path: Path) -> None:
    """With no prompt all tokens read what is stored; a prompt of all tokens, nothing."""
    from accuracy_study import PromptScorer

    model = load_model(
        open_source(str(save_tiny_model(tmp_path / "model"))),
        EngineConfig(kv_bits=4, device="cpu"),
    )
    windows = [list(range(3, 83)), list(range(100, 180))]
    exact = replace(model, quantization=replace(model.quantization, kv_bits=16))
    for prompt, same in ((0, model), (79, exact)):
        found, expected = (
            torch.cat([score.logprobs for score in scorer.score(windows)])
            for scorer in (PromptScorer(model, prompt), SequenceScorer(same))
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_jobs_are_those_that_can_be_done(tmp_path: Path) -> None:
    jobs = _study(tmp_path).jobs()
    names = [(job.row.name, job.seed) for job in jobs if job.row]
    assert names.count(("rtn", 0)) == 1 and ("rtn", 1) not in names
    assert ("qoq", 1) in names and ("in domain", 1) in names
    assert not any("own" in name for name, _ in names)
    assert jobs[0].row is None
