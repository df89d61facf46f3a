"""Quantize a model layer by layer, in the memory of one layer and its calibration activations.

A layer is written as soon as it is done, and what reaches the next one beside it; a run that was
killed goes on from there and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from qserve.formats.checkpoint import CheckpointWriter
from qserve.formats.layout import GROUP_SIZES, WEIGHT_ALIGNMENT
from qserve.models import names
from qserve.models.config import ModelConfig, ModelError
from qserve.models.loader import check_names, read_tensor
from qserve.models.source import WeightSource, fingerprint
from qserve.quant.calibrate import (
    Layer,
    calibration_text,
    calibration_windows,
    read_finite,
    read_layer,
)
from qserve.quant.layer import LayerQuantizer, QuantizedLayer, Streams
from qserve.quant.recipe import GroupSize, Recipe, RecipeError, find_recipe
from qserve.quant.rotate import RotatedSource

_BATCH_TOKENS = 1024
_TRIAL_BATCHES = 4
_RESIDENT_BYTES = 2**33
"""Activations of a layer that may stay on the device; more wait on the host for their turn."""


def quantize(
    source: WeightSource,
    directory: Path,
    recipe: str | Recipe = "qoq",
    group_size: GroupSize = "auto",
    calibration: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> None:
    """Write the quantized model to `directory`, which keeps what it held until all is done.

    group_size: "auto" takes the recipe's or else the largest that divides every linear.
    calibration: a text file or a hub dataset; None is text that comes with Python.
    seed: which windows of it. console: where progress goes, stderr by default.
    Raises ModelError, RecipeError or CalibrationError before anything is written, but for a tensor
    that is not what it must be, which shows when it is read.
    """
    job = plan(source, recipe, group_size, calibration, seed, device)
    with torch.no_grad(), _progress(console or Console(stderr=True)) as progress:
        job.run(CheckpointWriter(directory, job.fingerprint()), progress)


def plan(
    source: WeightSource,
    recipe: str | Recipe,
    group_size: GroupSize,
    calibration: str | None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Job:
    """What `quantize` would do; raises what it would."""
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    check_names(source)
    if source.quantization is not None:
        raise ModelError("the model is quantized already")
    size = resolve_group_size(source.config, recipe, group_size)
    _check_wide_linears(source.config, recipe)
    windows = calibration_windows(
        source.tokenizer(), calibration_text(calibration), recipe.sequences, recipe.length, seed
    )
    return Job(source, recipe, size, windows, torch.device(device))


def resolve_group_size(config: ModelConfig, recipe: Recipe, group_size: GroupSize) -> int:
    """The group size; ModelError or RecipeError if the model's sizes do not go with it."""
    sizes = names.linear_shapes(config)
    for name, shape in sizes.items():
        if any(size % WEIGHT_ALIGNMENT for size in shape):
            raise ModelError(f"{name}: sizes {shape} are not multiples of {WEIGHT_ALIGNMENT}")
    wanted = recipe.group_size if group_size == "auto" else group_size
    if wanted == "auto":
        return max(size for size in GROUP_SIZES if all(k % size == 0 for _, k in sizes.values()))
    if wanted not in (-1, *GROUP_SIZES):
        raise RecipeError(f"group size {wanted} is none of -1, {', '.join(map(str, GROUP_SIZES))}")
    for name, (_, inputs) in sizes.items():
        if inputs % wanted:
            raise RecipeError(f"group size {wanted} does not divide the {inputs} inputs of {name}")
    return wanted


def _check_wide_linears(config: ModelConfig, recipe: Recipe) -> None:
    for pattern in recipe.wide_linears:
        alone = replace(recipe, wide_linears=(pattern,))
        if not any(_wide_linears(config, alone, index) for index in range(config.num_layers)):
            raise RecipeError(f"no linear of the model is named {pattern!r}")


def _wide_linears(config: ModelConfig, recipe: Recipe, layer_index: int) -> frozenset[str]:
    """The linears of a layer that the recipe keeps at 8 bits."""
    linears = names.linear_shapes(config)
    return frozenset(linear for linear in linears if recipe.is_wide(layer_index, linear))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


@dataclass(frozen=True)
class Job:
    """A model, what is to be done to it, and calibration windows i64 [sequences, length]."""

    source: WeightSource
    recipe: Recipe
    group_size: int
    windows: Tensor
    device: torch.device

    def fingerprint(self) -> str:
        """Of all that the checkpoint's bytes depend on."""
        model = fingerprint(self.source)
        what = (model, self.recipe, self.group_size, self.windows.tolist(), self.device.type)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def run(self, writer: CheckpointWriter, progress: Progress) -> None:
        """Write what is not written yet, and commit."""
        source = self._in_best_basis(progress)
        self._write_outer(source, writer)
        task = progress.add_task("Quantizing layers", total=source.config.num_layers)
        for index, error in self._layers(source, writer):
            progress.update(
                task, completed=index + 1, description=f"Quantizing layers, error {error:.4f}"
            )
        self.source.save_tokenizer(writer.partial)
        quantization = self.recipe.quantization(self.group_size).to_json()
        dtype = str(_float_dtype(source.config)).removeprefix("torch.")
        writer.commit({**source.hf_config, "dtype": dtype, "quantization_config": quantization})

    def _in_best_basis(self, progress: Progress) -> WeightSource:
        if self.recipe.rotation == "never":
            return self.source
        rotated = RotatedSource(self.source, self.device)
        if self.recipe.rotation == "always":
            return rotated
        plain, turned = self._trial_errors(rotated, progress)
        progress.console.print(
            f"Error of trial layers: {plain:.5f} as they are, {turned:.5f} rotated: "
            f"{'rotating' if turned < plain else 'not rotating'} the residual stream"
        )
        return rotated if turned < plain else self.source

    def _trial_errors(self, rotated: RotatedSource, progress: Progress) -> tuple[float, float]:
        """Summed errors of a few layers, as they are and rotated, each quantized for its own."""
        layers = self.source.config.num_layers
        trials = {layers // 3, 2 * layers // 3}
        plain = turned = 0.0
        batches = self._embed(self.source)[:_TRIAL_BATCHES]
        for index in progress.track(range(max(trials) + 1), description="Trying a rotation"):
            layer = read_layer(self.source, index, self.device)
            if index in trials:
                plain += self._trial_error(layer, batches)
                basis = rotated.rotation.float()
                turned += self._trial_error(
                    read_layer(rotated, index, self.device),
                    [(x.to(self.device) @ basis).to(x.device) for x in batches],
                )
            batches = self._quantizer().run_exact(layer, batches)
        return plain, turned

    def _trial_error(self, layer: Layer, batches: list[Tensor]) -> float:
        """The error of a quantized layer on the first batch, fitted to the others."""
        held_out, fitted = batches[:1], batches[1:]
        quantizer = self._quantizer()
        quantized, _ = quantizer.quantize(layer, Streams(fitted, fitted))
        expected = quantizer.run_exact(layer, held_out)
        return Streams(expected, quantizer.run_served(quantized.served, held_out)).error

    def _layers(
        self, source: WeightSource, writer: CheckpointWriter
    ) -> Iterator[tuple[int, float]]:
        """Quantize and write each layer that is not written yet; yields its index and error."""
        quantizer = self._quantizer()
        done, streams = self._start(source, writer)
        for index in range(done, source.config.num_layers):
            layer = read_layer(source, index, self.device)
            wide = _wide_linears(source.config, self.recipe, index)
            quantized, streams = quantizer.quantize(layer, streams, wide)
            writer.write(_shard(index + 1), _tensors(quantized, index, _float_dtype(source.config)))
            writer.save_state(index + 1, _packed_streams(streams))
            yield index, streams.error

    def _start(self, source: WeightSource, writer: CheckpointWriter) -> tuple[int, Streams]:
        embedded = self._embed(source)
        done, state = writer.load_state()
        if done == 0:
            return 0, Streams(embedded, embedded)
        sizes = [len(batch) for batch in embedded]
        home = embedded[0].device
        exact, served = (state[name].to(home).split(sizes) for name in ("exact", "served"))
        return done, Streams(list(exact), list(served))

    def _quantizer(self) -> LayerQuantizer:
        return LayerQuantizer(
            self.source.config, self.recipe, self.group_size, self.windows.shape[1], self.device
        )

    def _embed(self, source: WeightSource) -> list[Tensor]:
        """The calibration windows, embedded: batches [T, H] of whole windows, where they are kept."""
        embedding = read_tensor(source, names.EMBEDDING)
        sequences, length = self.windows.shape
        windows = self.windows.split(max(1, min(_BATCH_TOKENS // length, sequences // 4)))
        return [
            embedding[batch.flatten().to(embedding.device)].to(self._home(), torch.float32)
            for batch in windows
        ]

    def _home(self) -> torch.device:
        """Where activations are kept: on the device as long as there are few of them."""
        config = self.source.config
        per_token = 2 * 4 * (2 * config.hidden_size + config.intermediate_size)
        fits = self.windows.numel() * per_token <= _RESIDENT_BYTES
        return self.device if fits else torch.device("cpu")

    def _write_outer(self, source: WeightSource, writer: CheckpointWriter) -> None:
        if not writer.has(_shard(0)):
            outer = [name for name in names.tensor_shapes(source.config) if ".layers." not in name]
            dtype = _float_dtype(source.config)
            tensors = {name: read_finite(source, name, self.device, dtype) for name in outer}
            writer.write(_shard(0), tensors)


def _shard(number: int) -> str:
    return f"model-{number:05d}"


def _float_dtype(config: ModelConfig) -> torch.dtype:
    """Of what is not quantized: the model's own, half precision at the most."""
    return torch.float16 if config.dtype == torch.float32 else config.dtype


def _tensors(quantized: QuantizedLayer, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors by their full names."""
    tensors = {name: tensor.to(dtype) for name, tensor in quantized.tensors.items()}
    for linear, weight in quantized.weights.items():
        tensors |= {f"{linear}.{suffix}": tensor for suffix, tensor in weight.tensors().items()}
    return {names.layer_prefix(index) + name: tensor for name, tensor in tensors.items()}


def _packed_streams(streams: Streams) -> dict[str, Tensor]:
    return {"exact": torch.cat(streams.exact), "served": torch.cat(streams.served)}
