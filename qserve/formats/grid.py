"""Grids of 4-bit codes: which values the codes of a weight stand for, before it is packed.

Source: QServe / QoQ, arXiv 2405.04532, section 4.1; `weight` says what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats import layout
from qserve.formats.layout import CODE_MAX, GROUP_SCALE_MAX, PROTECTIVE_RANGE
from qserve.formats.weight import W4Weight, check_group_size


@dataclass(frozen=True)
class ChannelGrid:
    """Where the codes of a per-channel weight lie: scale float16 [N], zero u8 [N]."""

    scale: Tensor
    zero: Tensor

    @classmethod
    def fit(cls, weight: Tensor, clip_ratio: Tensor | float = 1.0) -> ChannelGrid:
        """The grid that spans each row of weight [N, K], its range shrunk by `clip_ratio` (or [N])."""
        low, high = _range_with_zero(weight, clip_ratio)
        scale = _positive((high - low) / CODE_MAX)
        zero = torch.round(-low / scale.float()).clamp_(0, CODE_MAX).to(torch.uint8)
        return cls(scale, zero)

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes u8 [N, K] of weight [N, K]."""
        steps = torch.round(weight.float() / self.scale.float()[:, None] + self.zero[:, None])
        return steps.clamp_(0, CODE_MAX).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """float32 [N, K] of codes u8 [N, K]."""
        return (codes.float() - self.zero.float()[:, None]) * self.scale.float()[:, None]

    def pack(self, codes: Tensor) -> W4Weight:
        """The checkpoint tensors of codes u8 [N, K] on this grid."""
        szeros = (self.zero.float() * self.scale.float()).half()
        return W4Weight(layout.pack_weight_codes(codes), self.scale, szeros)


@dataclass(frozen=True)
class GroupGrid:
    """Where the codes of a per-group weight lie.

    scale: float16 [N], level 1. group_scale, group_zero: u8 [N, K/g], level 2.
    """

    scale: Tensor
    group_scale: Tensor
    group_zero: Tensor
    group_size: int

    @classmethod
    def fit(cls, weight: Tensor, group_size: int, clip_ratio: Tensor | float = 1.0) -> GroupGrid:
        """The grid that spans each group of weight [N, K]; `clip_ratio` may be [N, K/g].

        Level 1 is symmetric within +-119; level 2 asymmetric within each group.
        """
        check_group_size(group_size)
        rows, columns = weight.shape
        grouped = weight.float().reshape(rows, columns // group_size, group_size)
        low, high = _range_with_zero(grouped, clip_ratio)
        magnitude = torch.maximum(-low, high).amax(dim=-1)
        scale = _positive(magnitude / PROTECTIVE_RANGE)
        level1 = scale.float()[:, None]
        low = (low / level1).clamp(-PROTECTIVE_RANGE, 0)
        high = (high / level1).clamp(0, PROTECTIVE_RANGE)
        group_scale = torch.round((high - low) / CODE_MAX).clamp_(1, GROUP_SCALE_MAX)
        group_zero = torch.round(-low / group_scale).clamp_(0, CODE_MAX)
        return cls(scale, group_scale.to(torch.uint8), group_zero.to(torch.uint8), group_size)

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes u8 [N, K] of weight [N, K]."""
        level1 = weight.float() / self.scale.float()[:, None]
        steps = torch.round(
            level1 / self._per_column(self.group_scale) + self._per_column(self.group_zero)
        )
        return steps.clamp_(min=0).minimum(self._per_column(self.max_code)).to(torch.uint8)

    @property
    def max_code(self) -> Tensor:
        """u8 [N, K/g]: the largest code whose level-1 value (q - z) * s2 is an int8."""
        scale, zero = self.group_scale.to(torch.int32), self.group_zero.to(torch.int32)
        return ((127 + zero * scale) // scale).clamp(max=CODE_MAX).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """float32 [N, K] of codes u8 [N, K]."""
        level1 = codes.float() - self._per_column(self.group_zero)
        return level1 * self._per_column(self.group_scale) * self.scale.float()[:, None]

    def pack(self, codes: Tensor) -> W4Weight:
        """The checkpoint tensors of codes u8 [N, K] on this grid."""
        negative_offset = self.group_zero.to(torch.int32) * self.group_scale.to(torch.int32)
        return W4Weight(
            layout.pack_weight_codes(codes),
            self.scale,
            s2_scales=layout.pack_group_scales(self.group_scale.to(torch.int8)),
            s2_zeros=layout.pack_group_scales((-negative_offset).to(torch.int8)),
        )

    def _per_column(self, values: Tensor) -> Tensor:
        return values.float().repeat_interleave(self.group_size, dim=1)


WeightGrid = ChannelGrid | GroupGrid


def fit_grid(weight: Tensor, group_size: int, clip_ratio: Tensor | float = 1.0) -> WeightGrid:
    """The grid of weight [N, K] for a group size of -1 (per-channel), 64 or 128."""
    if group_size == -1:
        return ChannelGrid.fit(weight, clip_ratio)
    return GroupGrid.fit(weight, group_size, clip_ratio)


def _range_with_zero(values: Tensor, clip_ratio: Tensor | float) -> tuple[Tensor, Tensor]:
    values = values.float()
    low = values.amin(dim=-1).clamp_(max=0) * clip_ratio
    high = values.amax(dim=-1).clamp_(min=0) * clip_ratio
    return low, high


def _positive(scale: Tensor) -> Tensor:
    """float16 scales, raised where they would vanish, lowered where a code times them would overflow."""
    half = torch.finfo(torch.float16)
    smallest = half.smallest_normal * half.eps  # small rows need scales below the normal range
    return scale.clamp(smallest, half.max / (CODE_MAX + 1)).half()
