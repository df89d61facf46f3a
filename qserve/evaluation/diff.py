"""A quantized model against its original, layer by layer: where quality is lost.

Compared is what no folded transformation changes: what attention and MLP add to the residual stream,
and the stream itself, brought back to the original's basis (see `basis`); then the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from qserve.evaluation.basis import BasisError, in_basis_of, read_weights, stream_rotation
from qserve.evaluation.sequences import EvaluatedModel, SequenceScorer, TokenIds
from qserve.models.attention import PagedAttention
from qserve.models.config import ModelConfig
from qserve.models.layers import Product
from qserve.models.source import WeightSource

NO_ERROR_DB = 300.0
"""The signal-to-noise ratio of what is equal."""

_LOGIT_ROWS = 256


class Agreement(NamedTuple):
    """sqnr_db: signal over quantization noise, energies, in decibel, at most 300. cosine: of the
    angle. Of activations, both are means over tokens (of the ratio of noise to signal)."""

    sqnr_db: float
    cosine: float


@dataclass(frozen=True)
class LayerDiff:
    """weights: by linear, in one basis. attention, mlp: what each adds to the residual stream, the
    layer being given the original's own input. output: the residual stream after the layer, with
    the errors of all layers before it."""

    weights: dict[str, Agreement]
    attention: Agreement
    mlp: Agreement
    output: Agreement


@dataclass(frozen=True)
class ModelDiff:
    """kl_divergence: of the next-token distributions from the original's, in nats, mean over tokens.
    top1_agreement: share of tokens for which both name the same likeliest next one.
    rotated: the residual stream is in another basis."""

    layers: list[LayerDiff]
    kl_divergence: float
    top1_agreement: float
    tokens: int
    rotated: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values; an agreement is {"sqnr_db", "cosine"}."""
        layers = [
            {
                "weights": {part: each._asdict() for part, each in layer.weights.items()},
                "attention": layer.attention._asdict(),
                "mlp": layer.mlp._asdict(),
                "output": layer.output._asdict(),
            }
            for layer in self.layers
        ]
        return {**vars(self), "layers": layers}


@torch.inference_mode()
def diff_models(
    original: EvaluatedModel,
    quantized: EvaluatedModel,
    windows: Sequence[TokenIds],
    progress: bool = False,
) -> ModelDiff:
    """Compare on token windows, each on its own. progress: show bars on stderr.

    Raises ValueError if a window exceeds a model's positions, BasisError if the one is not made from
    the other.
    """
    _check_same_shape(original.source.config, quantized.source.config)
    _check_lengths(windows, original, quantized)
    embeddings = (original.model.decoder.embedding, quantized.model.decoder.embedding)
    rotation = stream_rotation(*(embedding.to(embeddings[1].device) for embedding in embeddings))
    num_layers = original.source.config.num_layers
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        weights = [
            diff_weights(original.source, quantized.source, index, rotation, embeddings[1].device)
            for index in bar.track(range(num_layers), description="comparing weights")
        ]
        run = _Lockstep(SequenceScorer(original.model), SequenceScorer(quantized.model), rotation)
        for window in bar.track(windows, description="comparing activations"):
            run.compare(window)
    return run.result(weights)


def diff_weights(
    original: WeightSource,
    quantized: WeightSource,
    index: int,
    rotation: Tensor | None,
    device: torch.device,
) -> dict[str, Agreement]:
    """One layer's linears, dequantized, against the original's in their basis."""
    stored = read_weights(quantized, index, device)
    expected = in_basis_of(read_weights(original, index, device), stored, rotation, original.config)
    agreements = {}
    for part, weight in expected.items():
        tally = Tally()
        tally.add(weight.reshape(1, -1), stored[part].reshape(1, -1))
        agreements[part] = tally.agreement()
    return agreements


@dataclass
class Tally:
    """Sums over rows: of noise over signal, and of cosines."""

    noise: float = 0.0
    cosine: float = 0.0
    rows: int = 0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """expected, actual: [T, N]; a row of zeros that is met exactly counts as without error."""
        expected, actual = expected.double(), actual.double()
        noise = (actual - expected).square().sum(dim=1)
        signal = expected.square().sum(dim=1)
        self.noise += float(torch.where(noise == 0, 0, noise / signal).sum())
        same = torch.nn.functional.cosine_similarity(expected, actual, dim=1)
        self.cosine += float(torch.where(noise == 0, 1, same).sum())
        self.rows += len(expected)

    def agreement(self) -> Agreement:
        """Over all rows added."""
        noise = max(self.noise / self.rows, 10 ** (-NO_ERROR_DB / 10))
        return Agreement(-10 * math.log10(noise), self.cosine / self.rows)


@dataclass
class _LogitTally:
    divergence: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Logits [n, V]."""
        first, second = (logits.double().log_softmax(dim=-1) for logits in (expected, actual))
        self.divergence += float((first.exp() * (first - second)).sum())
        self.agreed += int((first.argmax(dim=-1) == second.argmax(dim=-1)).sum())
        self.tokens += len(expected)


class _Step(NamedTuple):
    """What attention and MLP add to the residual stream, and the stream after it, [T, H] each."""

    attention: Tensor
    mlp: Tensor
    output: Tensor


class _LayerTallies(NamedTuple):
    attention: Tally
    mlp: Tally
    output: Tally


@dataclass
class _Lockstep:
    """Two models, layer by layer on the same tokens; the quantized one also on the other's input."""

    original: SequenceScorer
    quantized: SequenceScorer
    rotation: Tensor | None
    layers: list[_LayerTallies] = field(init=False)
    logits: _LogitTally = field(default_factory=_LogitTally)

    def __post_init__(self) -> None:
        count = self.original.decoder.config.num_layers
        self.layers = [_LayerTallies(Tally(), Tally(), Tally()) for _ in range(count)]

    def compare(self, window: TokenIds) -> None:
        """Add a window to the tallies."""
        tokens = torch.tensor(window, device=self.original.device)
        exact, served = (side.decoder.embedding[tokens] for side in (self.original, self.quantized))
        attends = [side.attention([len(window)]) for side in (self.original, self.quantized)]
        for index, tallies in enumerate(self.layers):
            expected = _run_layer(self.original, index, exact, attends[0])
            own = _run_layer(self.quantized, index, self._rotated(exact), attends[1])
            served = _run_layer(self.quantized, index, served, attends[1]).output
            tallies.attention.add(expected.attention, self._restored(own.attention))
            tallies.mlp.add(expected.mlp, self._restored(own.mlp))
            tallies.output.add(expected.output, self._restored(served))
            exact = expected.output
        for rows, other_rows in zip(
            exact.split(_LOGIT_ROWS), served.split(_LOGIT_ROWS), strict=True
        ):
            self.logits.add(_logits(self.original, rows), _logits(self.quantized, other_rows))

    def result(self, weights: Sequence[dict[str, Agreement]]) -> ModelDiff:
        """Of the windows so far, and of each layer's weights."""
        layers = [
            LayerDiff(own, *(tally.agreement() for tally in tallies))
            for own, tallies in zip(weights, self.layers, strict=True)
        ]
        return ModelDiff(
            layers,
            kl_divergence=self.logits.divergence / self.logits.tokens,
            top1_agreement=self.logits.agreed / self.logits.tokens,
            tokens=self.logits.tokens,
            rotated=self.rotation is not None,
        )

    def _rotated(self, x: Tensor) -> Tensor:
        """From the original's basis to the quantized model's."""
        dtype = self.quantized.decoder.dtype
        return x.to(dtype) if self.rotation is None else (x.float() @ self.rotation).to(dtype)

    def _restored(self, x: Tensor) -> Tensor:
        """And back."""
        return x if self.rotation is None else x.float() @ self.rotation.T


def _run_layer(side: SequenceScorer, index: int, x: Tensor, attend: PagedAttention) -> _Step:
    added, stream = side.decoder.layers[index](x, None, attend, index)
    mlp = added.tensor() if isinstance(added, Product) else added
    return _Step(stream - x, mlp, stream + mlp)


def _logits(side: SequenceScorer, x: Tensor) -> Tensor:
    hidden, _ = side.decoder.norm(x)
    return side.decoder.logits(hidden)


def _check_lengths(windows: Sequence[TokenIds], *models: EvaluatedModel) -> None:
    positions = min(each.source.config.max_positions for each in models)
    for window in windows:
        if len(window) > positions:
            raise ValueError(
                f"a window of {len(window)} tokens exceeds the model's {positions} positions"
            )


def _check_same_shape(original: ModelConfig, quantized: ModelConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
    ):
        first, second = getattr(original, name), getattr(quantized, name)
        if first != second:
            raise BasisError(f"{name} is {first} in the one model and {second} in the other")
