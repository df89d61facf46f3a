"""Rotary position embedding as a table: every scaling is a function of the position alone.

Sources: RoFormer (arXiv 2104.09864) in the halves convention of GPT-NeoX; linear scaling
(arXiv 2306.15595); dynamic NTK scaling; the frequency bands of Llama 3.1 (arXiv 2407.21783).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qserve.models.config import ModelConfig, RopeConfig


def rope_table(config: ModelConfig, max_positions: int) -> Tensor:
    """float32 [max_positions, head_dim]: cosines in the first half of a row, sines in the last."""
    positions = torch.arange(max_positions, dtype=torch.float64)
    angles = positions[:, None] * _frequencies(config.rope, config.head_dim, positions)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def _frequencies(rope: RopeConfig, head_dim: int, positions: Tensor) -> Tensor:
    """Radians per position, float64 [1 or P, head_dim / 2]."""
    if rope.kind == "dynamic":
        return unscaled_frequencies(_dynamic_base(rope, head_dim, positions)[:, None], head_dim)
    frequencies = unscaled_frequencies(rope.theta, head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return frequencies * llama3_multipliers(rope, frequencies)
    return frequencies


def unscaled_frequencies(base: Tensor | float, head_dim: int) -> Tensor:
    """Radians per position before any scaling, float64 [head_dim / 2], or [P, ...] of bases [P, 1]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return torch.as_tensor(base, dtype=torch.float64) ** -exponents


def _dynamic_base(rope: RopeConfig, head_dim: int, positions: Tensor) -> Tensor:
    """The base a decoder uses when position p is the last: it grows once p leaves the trained range.

    A key keeps the rotation of the step that cached it, so the base depends on p alone.
    """
    stretch = (positions + 1).clamp(min=rope.original_max_positions) / rope.original_max_positions
    growth = rope.factor * stretch - (rope.factor - 1)
    return rope.theta * growth ** (head_dim / (head_dim - 2))


def llama3_multipliers(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """What Llama 3.1 multiplies frequencies by: 1 where fast, 1 / factor where slow, blended between."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    band = rope.high_freq_factor - rope.low_freq_factor
    blend = ((turns - rope.low_freq_factor) / band).clamp(0, 1)
    return blend + (1 - blend) / rope.factor
