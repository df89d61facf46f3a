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
    GROUP_SIZES,
    WEIGHT_ALIGNMENT,
)


class FormatError(ValueError):
    """A tensor or a setting is not what the format says; the message names it."""


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
        check_group_size(self.group_size)
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


def check_group_size(group_size: int) -> None:
    """FormatError unless groups of so many input channels may share a scale."""
    if group_size not in GROUP_SIZES:
        raise FormatError(f"group size {group_size} is none of -1, 64, 128")
