"""What a decoder is made of. `Linear` is the one policy about precision.

A `FloatLinear` multiplies tensors, a `QuantizedLinear` int8 activations; each asks whatever comes
before it (a norm, attention, the gated activation, or nothing) for the input it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.fused import (
    quantize_per_token,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from qserve.kernels.gemm import PreparedWeight, quantized_linear
from qserve.kernels.gemm_norm import linear_rms_norm_quantize

_ROW_BLOCK = 16
_FEWER_ROWS = (16, 64, 128, 192)
_MOST_ROWS = 256


@dataclass(frozen=True)
class Product:
    """x @ weight.T + bias of a quantized linear, not computed yet: a norm may go with it."""

    x: QuantizedActivation
    weight: PreparedWeight
    bias: Tensor | None
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """[M, N] in `dtype`."""
        return quantized_linear(self.x, self.weight, self.bias, self.dtype)


Addend = Tensor | Product
"""What a layer's half adds to the residual stream."""


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm: weight [H] and what is added to the mean square."""

    weight: Tensor
    eps: float

    def __call__(self, x: Addend, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), [M, H] both."""
        x = x.tensor() if isinstance(x, Product) else x
        return rms_norm(x, self.weight, self.eps, residual)

    def quantized(
        self, x: Addend, residual: Tensor | None = None
    ) -> tuple[QuantizedActivation, Tensor]:
        """As a call, the norm quantized per token."""
        if not isinstance(x, Product):
            return rms_norm_quantize(x, self.weight, self.eps, residual)
        assert residual is not None, "what comes first is the embedding, no product"
        return linear_rms_norm_quantize(
            x.x, x.weight, x.bias, x.dtype, self.weight, self.eps, residual
        )


class Attend(Protocol):
    """A step's attention, layer by layer; qkv [T, (Hq + 2 Hkv) D] is not rotated yet."""

    def __call__(self, layer_index: int, qkv: Tensor) -> Tensor:
        """[T, Hq D]."""

    def quantized(self, layer_index: int, qkv: Tensor) -> QuantizedActivation:
        """As a call, the output quantized per token."""


class Linear(Protocol):
    """y = input @ weight.T + bias, by where the input comes from; y [M, N]."""

    def __call__(self, x: Tensor) -> Tensor:
        """The input is x [M, K]."""

    def after_norm(
        self, norm: RMSNorm, x: Addend, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The input is the norm of x + residual, which is returned beside y."""

    def after_attention(self, attend: Attend, layer_index: int, qkv: Tensor) -> Addend:
        """The input is the layer's attention output, [M, K]."""

    def after_silu_mul(self, gate_up: Tensor) -> Addend:
        """The input is silu(gate) * up of gate_up [M, 2K]."""


@dataclass(frozen=True)
class FloatLinear:
    """weight [N, K] and bias [N] in the dtype of the input."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return float_linear(x, self.weight, self.bias)

    def after_norm(
        self, norm: RMSNorm, x: Addend, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        normed, residual = norm(x, residual)
        return self(normed), residual

    def after_attention(self, attend: Attend, layer_index: int, qkv: Tensor) -> Tensor:
        return self(attend(layer_index, qkv))

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        return self(silu_mul(gate_up))


@dataclass(frozen=True)
class Head:
    """The linear that gives logits: weight [V, H] in the dtype of the input.

    row_blocks: how many rows may be multiplied at a time, ascending. Libraries choose their algorithm,
    and so the last bits of a result, by the number of rows; these give every row the same bits.
    """

    weight: Tensor
    row_blocks: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor) -> Head:
        """On a GPU, tries which numbers of rows the library treats alike."""
        if weight.device.type == "cpu":
            return cls(weight, (_ROW_BLOCK,))
        x = torch.randn(_MOST_ROWS, weight.shape[1], device=weight.device).to(weight.dtype)
        whole = torch.mm(x, weight.T)
        alike = [n for n in _FEWER_ROWS if torch.equal(torch.mm(x[:n], weight.T), whole[:n])]
        return cls(weight, (*alike, _MOST_ROWS))

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [n, H] -> [n, V], in `out` of `empty` if given."""
        out = self.empty(len(hidden)) if out is None else out
        if len(out) < self._whole_blocks(len(hidden)):
            raise ValueError(f"out has {len(out)} rows, too few for logits of {len(hidden)}")
        start = 0
        while start < len(hidden):
            rows = hidden[start : start + self.row_blocks[-1]]
            block = next(block for block in self.row_blocks if block >= len(rows))
            padded = functional.pad(rows, (0, 0, 0, block - len(rows)))
            torch.mm(padded, self.weight.T, out=out[start : start + block])
            start += block
        return out[: len(hidden)]

    def empty(self, rows: int) -> Tensor:
        """Memory for the logits of so many rows or fewer."""
        return self.weight.new_empty(self._whole_blocks(rows), len(self.weight))

    def _whole_blocks(self, rows: int) -> int:
        most = self.row_blocks[-1]
        return -(-rows // most) * most


@dataclass(frozen=True)
class QuantizedLinear:
    """A 4- or 8-bit weight [N, K], with bias [N] in `dtype`, the dtype of the output."""

    weight: PreparedWeight
    bias: Tensor | None
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(quantize_per_token(x)).tensor()

    def after_norm(
        self, norm: RMSNorm, x: Addend, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        normed, residual = norm.quantized(x, residual)
        return self._product(normed).tensor(), residual

    def after_attention(self, attend: Attend, layer_index: int, qkv: Tensor) -> Product:
        return self._product(attend.quantized(layer_index, qkv))

    def after_silu_mul(self, gate_up: Tensor) -> Product:
        return self._product(silu_mul_quantize(gate_up))

    def _product(self, x: QuantizedActivation) -> Product:
        return Product(x, self.weight, self.bias, self.dtype)


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias, in the dtype of x.

    On the CPU, in blocks of one size: libraries choose their algorithm, and so the last bits of a
    result, by the number of rows, and a row must not depend on the rows beside it.
    """
    if x.device.type != "cpu":
        return functional.linear(x, weight, bias)
    blocks = functional.pad(x, (0, 0, 0, -len(x) % _ROW_BLOCK)).split(_ROW_BLOCK)
    return torch.cat([functional.linear(block, weight, bias) for block in blocks])[: len(x)]
