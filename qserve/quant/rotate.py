"""Rotations of the residual stream and of the values, folded into the weights.

Sources: QuaRot (arXiv 2404.00456), QoQ's block input rotation (arXiv 2405.04532, section 4.2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qserve.models import names
from qserve.models.config import ModelConfig
from qserve.models.loader import read_tensor
from qserve.models.source import WeightSource
from qserve.quant.calibrate import Layer
from qserve.quant.hadamard import hadamard

_WRITERS = names.OUTPUT + names.DOWN
"""Linears that write to the residual stream."""


class RotatedSource(WeightSource):
    """A source whose residual stream is multiplied by a Hadamard matrix, its norms folded.

    The model computes what it did: RMSNorm without a weight commutes with an orthogonal matrix.
    The head is no longer the embedding. Sums run in float64; tensors come as float64.
    """

    def __init__(self, source: WeightSource, device: torch.device | str = "cpu") -> None:
        self._source = source
        self.rotation = hadamard(source.config.hidden_size).to(device)
        self.hf_config: dict[str, Any] = {**source.hf_config, "tie_word_embeddings": False}

    def names(self) -> set[str]:
        return self._source.names() | {names.LM_HEAD}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._source.tokenizer()

    def save_tokenizer(self, directory: Path) -> None:
        self._source.save_tokenizer(directory)

    def tensor(self, name: str) -> Tensor:
        if name == names.LM_HEAD:
            return (self._head() * self._read(names.FINAL_NORM)) @ self.rotation
        tensor = self._read(name)
        if name == names.EMBEDDING:
            return tensor @ self.rotation
        if name == names.FINAL_NORM or name.endswith((names.ATTENTION_NORM, names.MLP_NORM)):
            return torch.ones_like(tensor)
        return self._layer_tensor(name, tensor)

    def _layer_tensor(self, name: str, tensor: Tensor) -> Tensor:
        _, _, index, linear = name.split(".", 3)
        linear, kind = linear.rsplit(".", 1)
        if linear in _WRITERS:
            return self.rotation.T @ tensor
        if linear in names.NORM_BEFORE and kind == "weight":
            norm = self._read(names.layer_prefix(int(index)) + names.NORM_BEFORE[linear])
            return (tensor * norm) @ self.rotation
        return tensor

    def _head(self) -> Tensor:
        tied = self._source.config.tie_word_embeddings
        return self._read(names.EMBEDDING if tied else names.LM_HEAD)

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._source, name).to(self.rotation.device, torch.float64)


def rotate_values(layer: Layer, config: ModelConfig) -> Layer:
    """Multiply the values of each head by a Hadamard matrix, and undo it in the output projection."""
    value, output = names.QKV[2], names.OUTPUT[0]
    weight = layer[f"{output}.weight"]
    rotation = hadamard(config.head_dim).to(weight)
    changed = {
        f"{output}.weight": (weight.unflatten(1, (-1, config.head_dim)) @ rotation).flatten(1)
    }
    for name in (f"{value}.weight", f"{value}.bias"):
        if name in layer:
            heads = layer[name].unflatten(0, (config.num_kv_heads, -1))
            changed[name] = torch.einsum("dc,hd...->hc...", rotation, heads).flatten(0, 1)
    return {**layer, **changed}
