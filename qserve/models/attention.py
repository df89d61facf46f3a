"""The two ways a decoder attends: over the pages of a KV cache, or densely over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qserve.formats.activation import QuantizedActivation
from qserve.formats.kv import KVFormat, quantize_kv
from qserve.kernels.attention import paged_attention, paged_attention_quantize
from qserve.kernels.fused import quantize_per_token
from qserve.kernels.kv_append import apply_hadamard, apply_rope, rope_append
from qserve.kernels.paged import PagedBatch
from qserve.models.config import ModelConfig

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with (layer index, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) after RoPE."""


@dataclass(frozen=True)
class PagedAttention:
    """Attention of one step: appends the batch's keys and values, then reads what the pages hold.

    pools: uint8 [L, pages, Hkv, block_bytes]. rope_table: float32 [P, D].
    hadamard: rotate q and k of each head after RoPE, which spreads outliers before they are quantized.
    key_centers: float32 [L, Hkv, D], subtracted from the keys before that, or None.
    """

    config: ModelConfig
    batch: PagedBatch
    pools: Tensor
    rope_table: Tensor
    kv_format: KVFormat
    hadamard: bool = False
    key_centers: Tensor | None = None

    def __call__(self, layer_index: int, qkv: Tensor) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) D] -> [T, Hq D]."""
        return paged_attention(self._append(layer_index, qkv), *self._context(layer_index))

    def quantized(self, layer_index: int, qkv: Tensor) -> QuantizedActivation:
        """As a call, the output quantized per token."""
        return paged_attention_quantize(self._append(layer_index, qkv), *self._context(layer_index))

    def _append(self, layer_index: int, qkv: Tensor) -> Tensor:
        return rope_append(
            qkv,
            self.rope_table,
            self.batch,
            self.pools[layer_index],
            self.kv_format,
            self.config.num_heads,
            self.hadamard,
            None if self.key_centers is None else self.key_centers[layer_index],
        )

    def _context(self, layer_index: int) -> tuple[PagedBatch, Tensor, KVFormat, float, int | None]:
        """What attention reads, and how."""
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        return self.batch, self.pools[layer_index], self.kv_format, scale, window


@dataclass(frozen=True)
class DenseAttention:
    """Causal attention over equally long sequences, flattened to T = S x length, without a cache.

    For calibration, and as the oracle of the paged path. rope_table: float32 [P, D].
    hadamard, key_center [Hkv, D]: as in `PagedAttention`; the observer sees q and k with both.
    kv_bits: 4 or 8 to read keys and values as pages of so many bits give them back.
    """

    config: ModelConfig
    length: int
    rope_table: Tensor
    hadamard: bool = False
    observer: Observer | None = None
    kv_bits: int = 16
    key_center: Tensor | None = None

    def __call__(self, layer_index: int, qkv: Tensor) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) D] -> [T, Hq D]."""
        heads = qkv.unflatten(-1, (-1, self.config.head_dim))
        sizes = [self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads]
        query, key, value = heads.split(sizes, dim=1)
        query, key = self._rope(query), self._rope(key)
        if self.key_center is not None:
            key = key - self.key_center
        if self.hadamard:
            query, key = apply_hadamard(query), apply_hadamard(key)
        if self.observer is not None:
            self.observer(layer_index, query, key, value)
        return self._attend(query, self._stored(key), self._stored(value))

    def quantized(self, layer_index: int, qkv: Tensor) -> QuantizedActivation:
        """As a call, the output quantized per token."""
        return quantize_per_token(self(layer_index, qkv))

    def _rope(self, heads: Tensor) -> Tensor:
        rows = self.rope_table[: self.length].repeat(len(heads) // self.length, 1)
        return apply_rope(heads, rows).to(heads.dtype)

    def _stored(self, heads: Tensor) -> Tensor:
        if self.kv_bits == 16:
            return heads
        return quantize_kv(heads, self.kv_bits).dequantize().to(heads.dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (
            heads.unflatten(0, (-1, self.length)).transpose(1, 2) for heads in (query, key, value)
        )
        window = self.config.sliding_window
        mask = None if window is None or window >= self.length else self._mask(window, query.device)
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return output.transpose(1, 2).flatten(2).flatten(0, 1)

    def _mask(self, window: int, device: torch.device) -> Tensor:
        positions = torch.arange(self.length, device=device)
        distance = positions[:, None] - positions
        return (distance >= 0) & (distance < window)
