"""Sources for the accuracy study: held in memory, dithered, or quantized a moment ago."""

from __future__ import annotations

import zlib
from pathlib import Path

import gguf
import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qserve.models.config import ModelError
from qserve.models.gguf_source import GGUFSource
from qserve.models.source import DirectorySource, WeightSource
from qserve.testing.tiny import MemorySource

_STEP_FIRST = (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0)
"""Types whose blocks begin with the step of their grid, a float16."""


class HeldSource(MemorySource):
    """A source's tensors and tokenizer, read once; the tokenizer is not saved."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source.hf_config, {name: source.tensor(name) for name in source.names()})
        self._tokenizer = source.tokenizer()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def save_tokenizer(self, directory: Path) -> None:
        """Nothing: who needs the tokenizer has this one."""


class QuantizedSource(DirectorySource):
    """A checkpoint, with the tokenizer of the source it was made from."""

    def __init__(self, directory: Path, original: WeightSource) -> None:
        super().__init__(directory)
        self._tokenizer = original.tokenizer()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer


class _DitheredSource(GGUFSource):
    """Each quantized weight plus uniform noise of at most half a step of its own grid.

    The file's weights lie on a 4-bit grid in their original basis, which flatters rounding there.
    """

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__(path)
        self._seed = seed

    def _dequantize(self, stored: str) -> Tensor:
        values = super()._dequantize(stored)
        tensor = self._stored[stored]
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            return values
        if tensor.tensor_type not in _STEP_FIRST:
            raise ModelError(f"{stored}: the step of {tensor.tensor_type.name} is not known here")
        generator = torch.Generator().manual_seed(zlib.crc32(stored.encode(), self._seed))
        noise = torch.rand(values.shape, generator=generator) - 0.5
        return values + noise * _steps(tensor).reshape(values.shape)


def _steps(tensor: gguf.ReaderTensor) -> Tensor:
    """The step of each weight's grid, float32, flat."""
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    first = numpy.ascontiguousarray(tensor.data.reshape(-1, size)[:, :2]).view(numpy.float16)
    return torch.from_numpy(first.astype(numpy.float32)).repeat_interleave(block)


def dithered_source(source: WeightSource, seed: int) -> WeightSource:
    """A dithered copy of a GGUF file's model; ModelError for any other."""
    if not isinstance(source, GGUFSource):
        raise ModelError("only the weights of a GGUF file have a grid to dither on")
    return _DitheredSource(source.path, seed)
