"""Measures what each pass of the recipes is worth, by quantizing and evaluating a model many times.

    python benchmarks/accuracy_study.py --text wiki.test.raw --in-domain wiki.valid.tokens \
        --seeds 3 --workers 8 --output study.json          # writes study.md beside it
    python benchmarks/accuracy_study.py --dither 1 --dither 2 --sections dithered ...

Every row goes through `qserve.quant` into a checkpoint and through the ops that serve it. Rows run in
parallel processes, each calibration seed of all rows before the next one; `--seconds` starts no more
rows after that. Rounding to nearest knows no seed and runs once.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accuracy_rows import IN_DOMAIN, OWN_TEXT, SECTIONS, Row
from accuracy_sources import HeldSource, QuantizedSource, dithered_source
from accuracy_table import tables
from rich.console import Console
from torch import Tensor

from qserve.config import EngineConfig
from qserve.engine.loading import LoadedModel, load_model
from qserve.evaluation.sequences import SequenceScorer
from qserve.evaluation.text import text_windows
from qserve.formats.activation import QuantizedActivation
from qserve.kernels import quantize_per_token
from qserve.models.attention import DenseAttention
from qserve.models.rope import rope_table
from qserve.models.source import WeightSource, open_source
from qserve.quant.pipeline import quantize

FORMATS = {"W": (16, 16), "A8": (8, 16), "KV8": (8, 8), "KV4": (8, 4)}
"""Bits of activations, bits of keys and values; each step keeps those before it. Only methods are
measured with KV8."""

Windows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Job:
    """One row with one calibration seed, on the model as it is or dithered; no row: unquantized."""

    row: Row | None
    seed: int
    dither: int | None


@dataclass(frozen=True)
class PromptAttention:
    """Attention over equally long sequences, the first `prompt` tokens of which see keys and values
    unrounded, as if prefill attended to what it is about to store; the others read what is stored."""

    whole: DenseAttention
    kv_bits: int
    prompt: int
    key_centers: Tensor | None

    def __call__(self, layer_index: int, qkv: Tensor) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) D] -> [T, Hq D]."""
        center = None if self.key_centers is None else self.key_centers[layer_index].to(qkv.dtype)
        exact, stored = (
            replace(self.whole, kv_bits=bits, key_center=center)(layer_index, qkv)
            for bits in (16, self.kv_bits)
        )
        positions = torch.arange(len(qkv), device=qkv.device) % self.whole.length
        return torch.where((positions < self.prompt)[:, None], exact, stored)

    def quantized(self, layer_index: int, qkv: Tensor) -> QuantizedActivation:
        """As a call, the output quantized per token."""
        return quantize_per_token(self(layer_index, qkv))


class PromptScorer(SequenceScorer):
    """Scores sequences of one length by `PromptAttention`."""

    def __init__(self, model: LoadedModel, prompt: int) -> None:
        super().__init__(model)
        self._prompt, self._quantization = prompt, model.quantization

    def attention(self, lengths: Sequence[int]) -> PromptAttention:
        """What the decoder attends with, for sequences of these lengths, flattened."""
        (length,) = set(lengths)
        config, quantization = self.decoder.config, self._quantization
        table = rope_table(config, length).to(self.device)
        whole = DenseAttention(config, length, table, quantization.k_hadamard)
        centers = self.decoder.key_centers
        return PromptAttention(whole, quantization.kv_bits, self._prompt, centers)


class Study:
    """The model, its dithered copies and the text, held once for all processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        source = open_source(options.model)
        self._sources: dict[int | None, WeightSource] = {None: HeldSource(source)}
        for seed in options.dither:
            self._sources[seed] = HeldSource(dithered_source(source, seed))
        text = Path(options.text).read_text(encoding="utf-8")
        self._windows = text_windows(source.tokenizer(), text, options.length, options.windows)
        self._calibration = {None: None, IN_DOMAIN: options.in_domain, OWN_TEXT: options.own_text}
        self._deadline = time.monotonic() + options.seconds

    def jobs(self) -> list[Job]:
        """All that is asked for and can be done with the texts that are given."""
        rows = [row for section in self.options.sections for row in SECTIONS[section]()]
        rows = [
            row for row in rows if row.calibration is None or self._calibration[row.calibration]
        ]
        jobs = [Job(None, 0, dither) for dither in self._sources]
        for seed in range(self.options.seeds):
            for row in rows if seed == 0 else filter(lambda row: row.recipe.is_calibrated, rows):
                dithers = self.options.dither if row.section == "dithered" else [None]
                jobs += [Job(row, seed, dither) for dither in dithers]
        return jobs

    def measure(self, job: Job) -> dict[str, Any] | None:
        """The job's results, None if it is too late to start."""
        if time.monotonic() > self._deadline:
            return None
        try:
            return self._measure(job)
        except Exception:  # one row that fails must not take the others along
            traceback.print_exc()
            return None

    def _measure(self, job: Job) -> dict[str, Any]:
        source = self._sources[job.dither]
        if job.row is None:
            found = {"W": self._perplexity(load_model(source, self._config(None, 16)))}
            return {"section": "unquantized", "name": "", "dither": job.dither, "perplexity": found}
        named = {"section": job.row.section, "name": job.row.name, "dither": job.dither}
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            self._quantize(job.row, source, Path(directory) / "model", job.seed)
            seconds = time.perf_counter() - start
            checkpoint = QuantizedSource(Path(directory) / "model", source)
            found = {
                name: self._perplexity(load_model(checkpoint, self._config(*bits)))
                for name, bits in FORMATS.items()
                if name != "KV8" or job.row.section == "methods"
            }
            prompts = self._prompts(checkpoint) if job.row.prompts else {}
        return {**named, "seed": job.seed, "seconds": seconds, "perplexity": found | prompts}

    def _quantize(self, row: Row, source: WeightSource, directory: Path, seed: int) -> None:
        text, device = self._calibration[row.calibration], self.options.device
        quiet = Console(quiet=True)
        quantize(source, directory, row.recipe, row.group_size, text, seed, device, quiet)

    def _config(self, activation_bits: int | None, kv_bits: int) -> EngineConfig:
        return EngineConfig(
            device=self.options.device, activation_bits=activation_bits, kv_bits=kv_bits
        )

    def _perplexity(self, model: LoadedModel) -> float:
        return _perplexity(SequenceScorer(model), self._windows, 0)

    def _prompts(self, checkpoint: WeightSource) -> dict[str, float]:
        """Perplexity of the second halves of the windows, by what the first halves attend to."""
        half = self.options.length // 2
        model = load_model(checkpoint, self._config(8, 4))
        return {
            f"second halves, {name}": _perplexity(PromptScorer(model, prompt), self._windows, half)
            for name, prompt in (("quantized prompt", 0), ("unquantized prompt", half))
        }


def _perplexity(scorer: SequenceScorer, windows: Windows, skipped: int) -> float:
    """Of all tokens but the first `skipped` scored ones of each window."""
    logprobs = torch.cat([score.logprobs[skipped:] for score in scorer.score(windows)])
    return math.exp(-float(logprobs.double().mean()))


def _run(study: Study) -> list[dict[str, Any]]:
    """Processes are forked once everything is held, before any of them touches the device."""
    results: list[dict[str, Any]] = []
    start = time.monotonic()
    with multiprocessing.get_context("fork").Pool(study.options.workers) as pool:
        for result in pool.imap_unordered(study.measure, study.jobs()):
            if result is not None:
                results.append(result)
                study.options.output.write_text(json.dumps(results, indent=1))
                print(f"{time.monotonic() - start:6.1f}", _summary(result), flush=True)
    return results


def _summary(result: dict[str, Any]) -> str:
    values = " ".join(f"{value:.2f}" for value in result["perplexity"].values())
    seconds = f"{result.get('seconds', 0):.1f} s"
    return f"{values} ({seconds}) {result['section']}: {result['name']} {result['dither'] or ''}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure variations of the recipes.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True, help="what to evaluate on")
    parser.add_argument("--in-domain", help="text of the same kind to calibrate on, for its rows")
    parser.add_argument("--own-text", help="text the model wrote to calibrate on, for its rows")
    parser.add_argument("--output", type=Path, default=Path("study.json"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds of each row")
    parser.add_argument("--dither", type=int, action="append", default=[], help="seed of the noise")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=math.inf)
    return parser.parse_args()


def main() -> None:
    """Run the study; write its results as JSON and as Markdown tables."""
    options = _options()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results = _run(Study(options))
    options.output.with_suffix(".md").write_text(tables(results))


if __name__ == "__main__":
    main()
