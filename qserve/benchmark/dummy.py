"""Models with random weights, from a config.json alone: for speed, which does not depend on values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.formats.checkpoint import QuantizationConfig
from qserve.models.config import ModelConfig, ModelError, first_line
from qserve.models.names import KEY_CENTER, layer_prefix, linear_shapes, tensor_shapes

_HOST_BLOCK = 1 << 20
"""Random bytes a CPU draws for one tensor; it repeats them, which takes a copy's time."""


class NoText:
    """A tokenizer for requests whose text nobody reads."""

    chat_template = None

    def __len__(self) -> int:
        return 0

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        """Always empty."""
        return ""


@dataclass
class DummySource:
    """A `WeightSource` of random weights, quantized as by the default recipe: 4-bit linears, and keys
    that are centered and rotated.

    The weights' scale keeps activations of unit size, so that no step meets infinities. They are
    drawn on `device`.
    """

    hf_config: dict[str, Any]
    group_size: int = 128
    device: str = "cpu"

    @classmethod
    def read(cls, config: Path, group_size: int, device: str = "cpu") -> DummySource:
        """From a config.json, or the directory that holds one."""
        path = config / "config.json" if config.is_dir() else config
        try:
            return cls(json.loads(path.read_text()), group_size, device)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {first_line(error)}") from error

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf_config)

    @property
    def quantization(self) -> dict[str, Any]:
        config = QuantizationConfig(group_size=self.group_size, k_hadamard=True, k_center=True)
        return config.to_json()

    def names(self) -> set[str]:
        return set(self._shapes)

    def tensor(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise ModelError(f"there is no tensor {name}")
        shape = self._shapes[name]
        match name.rpartition(".")[2]:
            case "qweight":
                return self._bytes(shape)
            case "s1_scales":
                return self._full(shape, self._level_1_scale(name), torch.float16)
            case "s1_szeros":
                return self._full(shape, 8 * self._level_1_scale(name), torch.float16)
            case "s2_scales":
                return self._full(shape, 8, torch.int8)
            case "s2_zeros":
                return self._full(shape, -64, torch.int8)
        if len(shape) == 1:
            return self._full(shape, float("norm" in name), self.config.dtype)
        return self._bytes(shape).to(self.config.dtype).div_(74 * math.sqrt(shape[1]))

    def tokenizer(self) -> NoText:
        return NoText()

    def save_tokenizer(self, directory: Path) -> None:
        raise ModelError("a dummy model has no tokenizer")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(tensor_shapes(self.config))
        for index in range(self.config.num_layers):
            center = (self.config.num_kv_heads, self.config.head_dim)
            shapes[layer_prefix(index) + KEY_CENTER] = center
            for part, (rows, columns) in linear_shapes(self.config).items():
                linear = layer_prefix(index) + part
                del shapes[f"{linear}.weight"]
                shapes |= {
                    f"{linear}.qweight": (rows, columns // 2),
                    f"{linear}.s1_scales": (rows,),
                }
                if self.group_size == -1:
                    shapes[f"{linear}.s1_szeros"] = (rows,)
                else:
                    groups = (columns // self.group_size, rows)
                    shapes |= {f"{linear}.s2_scales": groups, f"{linear}.s2_zeros": groups}
        return shapes

    def _level_1_scale(self, name: str) -> float:
        """For unit outputs of unit inputs: uniform codes have a deviation of 4.6 steps."""
        columns = self._shapes[name.rpartition(".")[0] + ".qweight"][1] * 2
        step = 1 if self.group_size == -1 else 8
        return 1 / (4.6 * step * math.sqrt(columns))

    def _full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def _bytes(self, shape: tuple[int, ...]) -> Tensor:
        """Random int8."""
        size = math.prod(shape)
        drawn = min(size, _HOST_BLOCK) if self.device == "cpu" else size
        block = torch.randint(-128, 128, (drawn,), dtype=torch.int8, device=self.device)
        return block.repeat(-(-size // drawn))[:size].reshape(shape)


def dummy_engine(model: Path, group_size: int, config: EngineConfig) -> Engine:
    """An engine of random weights, from a config.json or the directory that holds one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Engine.from_source(DummySource.read(model, group_size, device), config)
