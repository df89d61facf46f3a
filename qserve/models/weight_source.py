"""What a source of a model's tensors is, wherever it takes them from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qserve.models.config import ModelConfig
from qserve.models.names import layer_prefix


class WeightSource(Protocol):
    """A model's configuration, tensors and tokenizer, by their Hugging Face names."""

    hf_config: dict[str, Any]
    """config.json, `eos_token_id` holding those of generation_config.json too."""

    @property
    def config(self) -> ModelConfig:
        """What `hf_config` says."""
        return ModelConfig.from_hf(self.hf_config)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json."""
        return self.hf_config.get("quantization_config")

    def names(self) -> set[str]:
        """Names of all tensors."""

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in; ModelError if it cannot be read."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ModelError if there is none."""

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's files into an existing directory."""


def fingerprint(source: WeightSource) -> str:
    """A digest of the configuration and of a sample of the tensors: those outside of the layers and
    those of the first and last layer."""
    inner = tuple(layer_prefix(index) for index in range(1, source.config.num_layers - 1))
    digest = hashlib.sha256(json.dumps(source.hf_config, sort_keys=True, default=str).encode())
    for name in sorted(source.names()):
        if not name.startswith(inner):
            tensor = source.tensor(name).contiguous()
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
