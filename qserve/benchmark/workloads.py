"""The linears of the model families that the kernels are measured on, and random operands."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.grid import fit_grid
from qserve.formats.weight import QuantizedWeight, W4Weight, W8Weight
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.testing.timing import copies_beyond_cache

Shape = tuple[int, int]

FAMILIES: dict[str, dict[str, Shape]] = {
    "llama-3-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "llama-2-7b": {
        "qkv": (12288, 4096),
        "o": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
    },
    "qwen1.5-72b": {
        "qkv": (24576, 8192),
        "o": (8192, 8192),
        "gate_up": (49152, 8192),
        "down": (8192, 24576),
    },
    "smollm2-135m": {
        "qkv": (960, 576),
        "o": (576, 576),
        "gate_up": (3072, 576),
        "down": (576, 1536),
    },
}
"""Family -> linear -> (N, K)."""


def activation(tokens: int, columns: int) -> QuantizedActivation:
    """Quantized Gaussian values, int8 [tokens, columns]."""
    return quantize_activation(torch.randn(tokens, columns, device="cuda"))


def random_weight(rows: int, columns: int, group_size: int) -> W4Weight:
    """Gaussian weights [rows, columns], rounded; groups of 64 where 128 does not divide columns."""
    weight = torch.randn(rows, columns, device="cuda")
    fits = group_size == -1 or columns % group_size == 0
    grid = fit_grid(weight, group_size if fits else 64)
    return grid.pack(grid.quantize(weight))


def random_int8_weight(rows: int, columns: int) -> W8Weight:
    """Gaussian weights [rows, columns], rounded to 8 bits."""
    return W8Weight.quantize(torch.randn(rows, columns, device="cuda"))


def cuda_copies(weight: QuantizedWeight) -> list[CudaWeight]:
    """The weight for the kernels, as many times as no cache holds."""
    first = CudaWeight.prepare(weight, torch.device("cuda", torch.cuda.current_device()))
    copies = copies_beyond_cache(first.packed.nbytes)
    return [first] + [replace(first, packed=first.packed.clone()) for _ in range(copies - 1)]
