"""Weights: 4 bits per channel or per group with two-level (progressive) scales, and 8 bits.

Source: QServe / QoQ, arXiv 2405.04532. The tensors are those of the published checkpoints.

- per-channel, group_size -1:     w = (q - z) * s1
- per-group, group_size 64 | 128: w = s1 * int8(q * s2 + z2), z2 = -z * s2

with q in 0..15, one float16 s1 per output row, and for groups an integer s2 in 1..17 and z in 0..15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qserve.formats import layout
from qserve.formats.layout import (
    CODE_MAX,
    GROUP_SCALE_MAX,
    GROUP_SIZES,
    PROTECTIVE_RANGE,
    WEIGHT_ALIGNMENT,
)


class FormatError(ValueError):
    """A tensor or a setting is not what the format says; the message names it."""


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
        _check_group_size(group_size)
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


@dataclass(frozen=True)
class W4Weight:
    """A packed 4-bit weight of shape [N, K].

    qweight: int8 [N, K/2] in tile order (`layout.pack_weight_codes`). s1_scales: float16 [N].
    Per-channel: s1_szeros float16 [N] = z * s1. Per-group: s2_scales, s2_zeros int8 [K/g, N]
    in the order of `layout.pack_group_scales`; s2_zeros = -z * s2 modulo 256.
    """

    qweight: Tensor
    s1_scales: Tensor
    s1_szeros: Tensor | None = None
    s2_scales: Tensor | None = None
    s2_zeros: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def group_size(self) -> int:
        """-1 per channel, else 64 or 128."""
        return -1 if self.s2_scales is None else self.shape[1] // self.s2_scales.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint suffix -> tensor, for those that are present."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def codes(self) -> Tensor:
        """u8 [N, K]."""
        return layout.unpack_weight_codes(self.qweight)

    def integers(self) -> Tensor:
        """What the integer GEMM multiplies, int8 [N, K]: q per channel, int8(q * s2 + z2) per group."""
        codes = self.codes()
        if self.s2_scales is None or self.s2_zeros is None:
            return codes.view(torch.int8)
        scales = layout.unpack_group_scales(self.s2_scales).view(torch.uint8)
        zeros = layout.unpack_group_scales(self.s2_zeros).view(torch.uint8)
        grouped = codes.reshape(codes.shape[0], -1, self.group_size)
        wrapped = grouped * scales[:, :, None] + zeros[:, :, None]  # uint8 wraps modulo 256
        return wrapped.reshape(codes.shape).view(torch.int8)

    def zeros(self) -> Tensor:
        """Per-channel zero points float32 [N]; integers unless the file rounded them otherwise."""
        if self.s1_szeros is None:
            raise FormatError("a per-group weight has no per-channel zero points")
        ratio = self.s1_szeros.float() / self.s1_scales.float()
        nearest = ratio.round()
        return torch.where((ratio - nearest).abs() < 0.02, nearest, ratio)

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        values = self.integers().float()
        if self.group_size == -1:
            values = values - self.zeros()[:, None]
        return values * self.s1_scales.float()[:, None]

    def validate(self, name: str = "weight") -> W4Weight:
        """Return self, or raise FormatError naming the first tensor that does not fit."""
        for suffix in self.tensors().keys() & {"qweight", "s2_scales"}:
            if self.tensors()[suffix].dim() != 2 or not self.tensors()[suffix].numel():
                raise FormatError(f"{name}.{suffix}: not a matrix")
        for suffix, (dtype, shape) in self._expected().items():
            tensor = self.tensors()[suffix]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise FormatError(
                    f"{name}.{suffix}: expected {dtype} {list(shape)}, "
                    f"found {tensor.dtype} {list(tensor.shape)}"
                )
        if any(size % WEIGHT_ALIGNMENT for size in self.shape):
            raise FormatError(f"{name}: sizes {self.shape} are not multiples of {WEIGHT_ALIGNMENT}")
        return self

    def _expected(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, columns = self.shape
        expected = {
            "qweight": (torch.int8, (rows, columns // 2)),
            "s1_scales": (torch.float16, (rows,)),
        }
        if (self.s2_scales is None) != (self.s2_zeros is None) or (
            (self.s1_szeros is None) == (self.s2_scales is None)
        ):
            raise FormatError("a 4-bit weight has either s1_szeros or both s2_scales and s2_zeros")
        if self.s2_scales is None:
            return {**expected, "s1_szeros": (torch.float16, (rows,))}
        _check_group_size(self.group_size)
        groups = (columns // self.group_size, rows)
        return {**expected, "s2_scales": (torch.int8, groups), "s2_zeros": (torch.int8, groups)}

    def in_kernel_order(self) -> W4Weight:
        """The same weight, its level-2 tensors reordered if DeepCompressor's converter wrote them.

        Only one order keeps every group's range [z2, 15 * s2 + z2] within 8 bits; a file whose two
        orders both do is taken as it is.
        """
        if self.s2_scales is None or self.s2_zeros is None or self._groups_fit(False):
            return self
        if not self._groups_fit(True):
            raise FormatError("level-2 scales leave 8 bits in either known order")
        reordered = [
            layout.pack_group_scales(layout.unpack_group_scales(tensor, deepcompressor=True))
            for tensor in (self.s2_scales, self.s2_zeros)
        ]
        return W4Weight(self.qweight, self.s1_scales, None, *reordered)

    def _groups_fit(self, deepcompressor: bool) -> bool:
        assert self.s2_scales is not None and self.s2_zeros is not None
        scales = layout.unpack_group_scales(self.s2_scales, deepcompressor)
        zeros = layout.unpack_group_scales(self.s2_zeros, deepcompressor)
        rows, groups = scales.shape
        codes = self.codes().reshape(rows, groups, -1).to(torch.int32)
        values = codes * scales[:, :, None].to(torch.int32) + zeros[:, :, None].to(torch.int32)
        return bool(((values >= -128) & (values <= 127)).all())

    @classmethod
    def concatenate(cls, weights: Sequence[W4Weight]) -> W4Weight:
        """One weight of all the rows, for linears that share an input."""
        if len({(weight.shape[1], weight.group_size) for weight in weights}) != 1:
            raise FormatError("weights to concatenate differ in input size or group size")
        dims = {"s2_scales": 1, "s2_zeros": 1}
        return cls(
            **{
                name: torch.cat(
                    [weight.tensors()[name] for weight in weights], dim=dims.get(name, 0)
                )
                for name in weights[0].tensors()
            }
        )


@dataclass(frozen=True)
class W8Weight:
    """An 8-bit weight: weight int8 [N, K] within +-127, dequant_scale float32 [N]."""

    weight: Tensor
    dequant_scale: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> W8Weight:
        """Nearest symmetric codes of weight [N, K], one scale per row."""
        scale = (weight.float().abs().amax(dim=1) / 127).clamp_(min=1e-8)
        codes = torch.round(weight.float() / scale[:, None]).clamp_(-127, 127)
        return cls(codes.to(torch.int8), scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.weight.nbytes + self.dequant_scale.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint suffix -> tensor."""
        return {"weight": self.weight, "dequant_scale": self.dequant_scale}

    def integers(self) -> Tensor:
        """What the integer GEMM multiplies, int8 [N, K]."""
        return self.weight

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.weight.float() * self.dequant_scale.float()[:, None]

    def validate(self, name: str = "weight") -> W8Weight:
        """Return self, or raise FormatError naming the first tensor that does not fit."""
        if self.weight.dtype != torch.int8 or self.weight.dim() != 2:
            raise FormatError(f"{name}.weight: expected an int8 matrix, found {self.weight.dtype}")
        if tuple(self.dequant_scale.shape) != (self.shape[0],):
            raise FormatError(
                f"{name}.dequant_scale: expected [{self.shape[0]}], "
                f"found {list(self.dequant_scale.shape)}"
            )
        return self

    @classmethod
    def concatenate(cls, weights: Sequence[W8Weight]) -> W8Weight:
        """One weight of all the rows, for linears that share an input."""
        return cls(
            torch.cat([weight.weight for weight in weights]),
            torch.cat([weight.dequant_scale for weight in weights]),
        )


QuantizedWeight = W4Weight | W8Weight


def _range_with_zero(values: Tensor, clip_ratio: Tensor | float) -> tuple[Tensor, Tensor]:
    values = values.float()
    low = values.amin(dim=-1).clamp_(max=0) * clip_ratio
    high = values.amax(dim=-1).clamp_(min=0) * clip_ratio
    return low, high


def _positive(scale: Tensor) -> Tensor:
    """float16 scales, raised where they would vanish, lowered where a code times them would overflow."""
    half = torch.finfo(torch.float16)
    return scale.clamp(half.tiny, half.max / (CODE_MAX + 1)).half()


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise FormatError(f"group size {group_size} is none of -1, 64, 128")
