"""Recipes side by side: quantize, evaluate, compare with the original; what is done stays done.

In the output folder, checkpoints and results bear names that say what they depend on, so a run that
was stopped goes on where it was, and another run with more recipes or seeds adds to it. Changes of the
code are not among what names say: they want another folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from qserve.config import EngineConfig
from qserve.engine.loading import resolve_device
from qserve.evaluation.diff import diff_models
from qserve.evaluation.perplexity import WINDOW_LENGTH, Perplexity, measure_perplexity
from qserve.evaluation.sequences import EvaluatedModel
from qserve.evaluation.text import text_windows
from qserve.models import names
from qserve.models.source import WeightSource, fingerprint
from qserve.quant.calibrate import calibration_text
from qserve.quant.pipeline import plan, quantize, resolve_group_size
from qserve.quant.recipe import GroupSize, Recipe

_DIFF_WINDOWS, _DIFF_LENGTH = 4, 512


@dataclass(frozen=True)
class Study:
    """What is compared on which text.

    seeds: of the choice of calibration windows; a recipe that uses them is quantized with every one,
        others with the first.
    kv_bits, activation_bits: each checkpoint is evaluated with every pair; None is its own.
    calibration: as of `quantize`. device: "auto" is the GPU where there is one.
    """

    source: WeightSource
    recipes: Sequence[Recipe]
    text: str
    window_length: int = WINDOW_LENGTH
    max_windows: int | None = None
    group_size: GroupSize = "auto"
    calibration: str | None = None
    seeds: Sequence[int] = (0,)
    kv_bits: Sequence[int | None] = (None,)
    activation_bits: Sequence[int | None] = (None,)
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    """One checkpoint under one choice of formats.

    bytes: of the checkpoint's tensors; of the unquantized model's in 16 bits. output_sqnr_db: of the
    residual stream after each layer, and kl_divergence and top1_agreement, are those of the
    checkpoint with its own formats against the original.
    """

    recipe: str
    seed: int
    weight_bits: int
    group_size: int
    kv_bits: int
    activation_bits: int
    perplexity: float
    bytes: int
    kl_divergence: float
    top1_agreement: float
    output_sqnr_db: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """unquantized: perplexity of the original with a 16-bit cache, and its bytes in 16 bits."""

    tokens: int
    unquantized: float
    unquantized_bytes: int
    rows: list[Row]


def compare(study: Study, output: Path, console: Console | None = None) -> Comparison:
    """Do what is not done yet, below `output`, and return all of the study's results.

    console: where progress goes, stderr by default. Raises ValueError before any work starts if a
    text is too short, a recipe does not go with the model, or a setting is out of range.
    """
    _check(study)
    return _Run(study, output, console or Console(stderr=True)).comparison()


def _check(study: Study) -> None:
    resolve_device(study.device)
    for kv, activations in product(study.kv_bits, study.activation_bits):
        EngineConfig(kv_bits=kv, activation_bits=activations)
    text_windows(study.source.tokenizer(), study.text, study.window_length, study.max_windows)
    for recipe in study.recipes:
        plan(study.source, recipe, study.group_size, study.calibration)


@dataclass(frozen=True)
class _Run:
    study: Study
    output: Path
    console: Console

    def comparison(self) -> Comparison:
        baseline = self._stored("unquantized", self._text_key, self._baseline)
        self.console.print(f"unquantized: perplexity {baseline['perplexity']:.4f}")
        rows = [
            row
            for recipe in self.study.recipes
            for seed in self.study.seeds[: None if recipe.is_calibrated else 1]
            for row in self._rows(recipe, seed)
        ]
        size = _bytes_in_16_bits(self.study.source)
        return Comparison(baseline["tokens"], baseline["perplexity"], size, rows)

    def _rows(self, recipe: Recipe, seed: int) -> Iterator[Row]:
        """The rows of one checkpoint, which is made if it is not there."""
        size = resolve_group_size(self.study.source.config, recipe, self.study.group_size)
        checkpoint_key = (self._model_key, recipe, size, self._calibration_key, seed, self._device)
        name = f"{recipe.name}-{'channel' if size == -1 else f'g{size}'}-seed{seed}"
        checkpoint = self.output / "checkpoints" / f"{name}-{_digest(checkpoint_key)}"
        if not checkpoint.is_dir():
            self._quantize(recipe, seed, checkpoint)
        key = (checkpoint_key, self._text_key)
        diff = self._stored(f"{name}-diff", key, partial(self._diff, checkpoint))
        of_checkpoint = partial(
            Row,
            recipe=recipe.name,
            seed=seed,
            weight_bits=recipe.weight_bits,
            group_size=size if recipe.weight_bits == 4 else -1,
            bytes=sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
            kl_divergence=diff["kl_divergence"],
            top1_agreement=diff["top1_agreement"],
            output_sqnr_db=tuple(layer["output"]["sqnr_db"] for layer in diff["layers"]),
        )
        for kv, activations in self._formats(recipe):
            cell = f"{name}-a{activations}-kv{kv}"
            compute = partial(self._perplexity, checkpoint, kv, activations)
            perplexity = self._stored(cell, key, compute)["perplexity"]
            self.console.print(f"{cell}: perplexity {perplexity:.4f}")
            yield of_checkpoint(kv_bits=kv, activation_bits=activations, perplexity=perplexity)

    def _formats(self, recipe: Recipe) -> list[tuple[int, int]]:
        """(KV bits, activation bits) of each evaluation of the recipe's checkpoints."""
        return [
            (kv or recipe.kv_bits, activations or recipe.activation_bits)
            for kv, activations in product(self.study.kv_bits, self.study.activation_bits)
        ]

    def _quantize(self, recipe: Recipe, seed: int, checkpoint: Path) -> None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        study = self.study
        quantize(
            study.source,
            checkpoint,
            recipe,
            study.group_size,
            study.calibration,
            seed=seed,
            device=resolve_device(study.device),
            console=self.console,
        )

    def _stored(self, name: str, key: object, compute: Callable[[], dict[str, Any]]) -> Any:
        """The result that was stored under this name and key, computed and stored if there is none."""
        path = self.output / "results" / f"{name}-{_digest(key)}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(compute(), indent=1))
            unfinished.replace(path)
        return json.loads(path.read_text())

    def _baseline(self) -> dict[str, Any]:
        return asdict(self._measured(self._original))

    def _perplexity(self, checkpoint: Path, kv: int, activations: int) -> dict[str, Any]:
        config = EngineConfig(kv_bits=kv, activation_bits=activations, device=self.study.device)
        return asdict(self._measured(EvaluatedModel.open(checkpoint, config)))

    def _measured(self, evaluated: EvaluatedModel) -> Perplexity:
        study = self.study
        return measure_perplexity(
            evaluated.model, study.text, study.window_length, study.max_windows, progress=True
        )

    def _diff(self, checkpoint: Path) -> dict[str, Any]:
        quantized = EvaluatedModel.open(checkpoint, EngineConfig(device=self.study.device))
        tokenizer, study = self._original.model.tokenizer, self.study
        length = min(_DIFF_LENGTH, study.window_length)
        windows = text_windows(tokenizer, study.text, length, _DIFF_WINDOWS)
        return diff_models(self._original, quantized, windows, progress=True).to_json()

    @cached_property
    def _original(self) -> EvaluatedModel:
        return EvaluatedModel.open(self.study.source, EngineConfig(device=self.study.device))

    @cached_property
    def _model_key(self) -> str:
        return fingerprint(self.study.source)

    @cached_property
    def _text_key(self) -> tuple[object, ...]:
        study = self.study
        return (
            self._model_key,
            _digest(study.text),
            study.window_length,
            study.max_windows,
            self._device,
        )

    @cached_property
    def _calibration_key(self) -> str:
        return _digest(calibration_text(self.study.calibration))

    @cached_property
    def _device(self) -> str:
        return resolve_device(self.study.device).type


def _digest(key: object) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:10]


def _bytes_in_16_bits(source: WeightSource) -> int:
    return sum(2 * math.prod(shape) for shape in names.tensor_shapes(source.config).values())
