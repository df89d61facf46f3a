"""Calibration: text to tokens, and a decoder layer that pauses at each of its linears."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from qserve.models import names
from qserve.models.config import ModelConfig, ModelError, first_line
from qserve.models.loader import read_tensor
from qserve.models.source import WeightSource

Layer = dict[str, Tensor]
"""A layer's tensors by their names within it: norms, weights [N, K], biases [N]."""

FUSED_LINEARS = (names.QKV, names.OUTPUT, names.GATE_UP, names.DOWN)
"""The linears of a layer that share an input, in the order of computation."""

_DATASET_CHARACTERS = 4_000_000
"""Read of a data set, several times what any recipe calibrates with."""

Steps = Generator[tuple[Tensor, Tensor | None], Tensor, Tensor]


class CalibrationError(ValueError):
    """The calibration text cannot be read or is too short; the message says which."""


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, sequences: int, length: int, seed: int
) -> Tensor:
    """i64 [sequences, length]: windows of the text without overlap, chosen by `seed`."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(tokens)[: len(tokens) // length * length].reshape(-1, length)
    if len(windows) < sequences:
        raise CalibrationError(
            f"the calibration text has {len(tokens)} tokens, {sequences * length} are needed"
        )
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:sequences]]


def calibration_text(origin: str | None = None) -> str:
    """Text of a file or of a hub dataset's training split; without either, Python's own topics."""
    if origin is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    if not Path(origin).is_file():
        return _dataset_text(origin)
    try:
        return Path(origin).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{origin}: not UTF-8 text at byte {error.start}") from error


def _dataset_text(name: str) -> str:
    """The first texts of a data set's training split, as many as `_DATASET_CHARACTERS` hold."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{name}: no such file; to read it as a hub dataset: pip install datasets"
        ) from error
    texts, total = [], 0
    try:
        for row in datasets.load_dataset(name, split="train", streaming=True):
            texts.append(row["text"])
            total += len(texts[-1])
            if total > _DATASET_CHARACTERS:
                break
    except (OSError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{name}: no such file or data set: {first_line(error)}") from error
    except KeyError as error:
        raise CalibrationError(f"{name}: a data set without a column 'text'") from error
    return "\n\n".join(texts)


def read_layer(
    source: WeightSource,
    index: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """All tensors of one layer, as `read_finite` reads them."""
    prefix = names.layer_prefix(index)
    return {
        name: read_finite(source, prefix + name, device, dtype)
        for name in names.layer_shapes(source.config)
    }


def read_finite(
    source: WeightSource, name: str, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """One tensor; ModelError if it is not what it must be, or not finite in `dtype`."""
    tensor = read_tensor(source, name).to(device, dtype)
    if not tensor.isfinite().all():
        raise ModelError(f"tensor {name} is not finite in {dtype}")
    return tensor


def fused_weight(layer: Layer, parts: Sequence[str]) -> Tensor:
    """[sum of N, K]: the weights of linears that share an input."""
    return torch.cat([layer[f"{part}.weight"] for part in parts])


def fused_bias(layer: Layer, parts: Sequence[str]) -> Tensor | None:
    """[sum of N], or None where the linears have no bias."""
    if f"{parts[0]}.bias" not in layer:
        return None
    return torch.cat([layer[f"{part}.bias"] for part in parts])


def layer_steps(
    layer: Layer, config: ModelConfig, x: Tensor, attend: Callable[[Tensor], Tensor]
) -> Steps:
    """One layer on x [T, H], pausing at each of `FUSED_LINEARS`, whose output it is to be sent.

    Yields the linear's input, and the residual stream that its output is added to (None where a
    norm made the input). attend: qkv [T, (Hq + 2 Hkv) D] -> [T, Hq D]. Returns [T, H]. All of this
    is where x is, the host perhaps; only what is computed next is brought to the layer's device.
    """
    home, device = x.device, layer[names.ATTENTION_NORM].device
    qkv = yield _norm(layer, names.ATTENTION_NORM, config, x.to(device)).to(home), None
    attended = attend(head_norm(layer, config, qkv)).to(home)
    del qkv  # what a paused layer holds stays in memory for every batch
    x = ((yield attended, x) + x.to(device)).to(home)
    gate_up = yield _norm(layer, names.MLP_NORM, config, x.to(device)).to(home), None
    gate, up = gate_up.chunk(2, dim=-1)
    activated = (functional.silu(gate) * up).to(home)
    del gate_up, gate, up, attended
    return ((yield activated, x) + x.to(device)).to(home)


def _norm(layer: Layer, name: str, config: ModelConfig, x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], layer[name], config.rms_norm_eps)


def head_norm(layer: Layer, config: ModelConfig, qkv: Tensor) -> Tensor:
    """qkv [T, (Hq + 2 Hkv) D], its queries and keys normed where the model does so."""
    if not config.qk_norm:
        return qkv
    sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    query, key, value = qkv.unflatten(-1, (-1, config.head_dim)).split(sizes, dim=-2)
    query = _norm(layer, names.QUERY_NORM, config, query)
    key = _norm(layer, names.KEY_NORM, config, key)
    return torch.cat((query, key, value), dim=-2).flatten(-2)


class PausedLayer:
    """`layer_steps` over many batches, all paused at the same linear."""

    def __init__(
        self,
        layer: Layer,
        config: ModelConfig,
        batches: Sequence[Tensor],
        attend: Callable[[Tensor], Tensor],
    ) -> None:
        self._steps = [layer_steps(layer, config, x, attend) for x in batches]
        self.pauses = [next(steps) for steps in self._steps]
        self.outputs: list[Tensor] = []

    @property
    def inputs(self) -> list[Tensor]:
        """The paused linear's input of each batch, [T, K]."""
        return [x for x, _ in self.pauses]

    @property
    def residuals(self) -> list[Tensor | None]:
        """What the paused linear's output of each batch is added to, [T, H] or None."""
        return [residual for _, residual in self.pauses]

    def resume(self, outputs: Iterable[Tensor]) -> None:
        """Send each batch its linear's output; after the last linear, fill `outputs`."""
        pauses = []
        for steps, output in zip(self._steps, outputs, strict=True):
            try:
                pauses.append(steps.send(output))
            except StopIteration as done:
                self.outputs.append(done.value)
        self.pauses = pauses
