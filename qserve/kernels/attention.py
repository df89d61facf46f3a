"""Attention over quantized pages, for decode steps and prefill chunks in one batch.

Scores follow the bytes in the pages: `q . k = scale * (q . code) + offset * sum(q)`, so dequantized
K and V never exist. Prefill reads the pages it has just written, as decode does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.formats.kv import KVFormat, unpack_codes, unpack_scales
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.fused import quantize_per_token
from qserve.kernels.op import FLOAT_DTYPES, Contract
from qserve.kernels.paged import AttentionInputs, PagedBatch

QUERY_BLOCK = 128
"""Queries that the reference scores at once: memory stays small, and no one looks past the block."""


def paged_attention(
    q: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each token over its sequence's pages.

    q: float [T, Hq, D], rotated like the pages' K. pool: uint8 [num_pages, Hkv, block_bytes], the
    batch's own tokens already appended. scale: factor of the scores, 1 / sqrt(D) as a rule.
    window: a token sees itself and the window - 1 tokens before it; None: all before it.
    Hq is a multiple of Hkv. Returns [T, Hq * D] in q's dtype.
    What lies in a page past the context is never read as a number.
    """
    _check(q, batch, pool, kv_format)
    if q.is_cuda:
        from qserve.kernels import attention_cuda

        inputs = AttentionInputs(q, batch, pool, kv_format, scale, window)
        return attention_cuda.paged_attention(inputs)
    out = torch.empty(q.shape[0], q.shape[1] * kv_format.head_dim, dtype=q.dtype)
    for group in _groups_of_equal_length(batch):
        contexts = _Contexts.read(pool, batch, group.sequences, kv_format)
        out[group.rows] = contexts.attend(q[group.rows], scale, window).to(q.dtype)
    return out


def paged_attention_quantize(
    q: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    scale: float,
    window: int | None = None,
) -> QuantizedActivation:
    """`paged_attention`, rounded to q's dtype, then per-token int8 of [T, Hq * D]."""
    return quantize_per_token(paged_attention(q, batch, pool, kv_format, scale, window))


def _check(q: Tensor, batch: PagedBatch, pool: Tensor, kv_format: KVFormat) -> None:
    kv_heads, head_dim = kv_format.num_kv_heads, kv_format.head_dim
    contract = Contract("paged_attention")
    contract.check("q", q, ("T", "Hq", head_dim), *FLOAT_DTYPES)
    contract.check("pool", pool, ("pages", kv_heads, kv_format.block_bytes), torch.uint8)
    contract.check("page_table", batch.page_table, ("B", "P"), torch.int32)
    contract.check("context_lens", batch.context_lens, ("B",), torch.int32)
    contract.require(q.shape[1] % kv_heads == 0, f"{q.shape[1]} heads over {kv_heads} KV heads")


@dataclass(frozen=True)
class _Group:
    """Sequences with as many queries each: int64 [n], and their tokens' rows, int64 [n, L]."""

    sequences: Tensor
    rows: Tensor


def _groups_of_equal_length(batch: PagedBatch) -> list[_Group]:
    starts = batch.query_start.long()
    lengths = starts.diff()
    groups = []
    for length in lengths.unique().tolist():
        sequences = (lengths == length).nonzero().flatten()
        groups.append(_Group(sequences, starts[sequences, None] + torch.arange(length)))
    return groups


@dataclass(frozen=True)
class _Contexts:
    """n sequences' K and V, padded to the longest: codes float64 [n, Hkv, C, D], channels in the
    order of `unpack_codes`.

    scales: float64 [n, Hkv, C, 4], the scale and offset of K, then of V; None for 16-bit pages.
    lengths: int64 [n]; past them scales and 16-bit values are zero.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor | None
    lengths: Tensor
    kv_format: KVFormat

    @classmethod
    def read(
        cls, pool: Tensor, batch: PagedBatch, sequences: Tensor, kv_format: KVFormat
    ) -> _Contexts:
        lengths = batch.context_lens[sequences].long()
        num_pages = -(-int(lengths.max()) // PAGE_TOKENS)
        pages = batch.page_table[sequences, :num_pages].long()
        blocks = pool[pages].transpose(1, 2).contiguous()
        past = torch.arange(num_pages * PAGE_TOKENS) >= lengths[:, None, None]
        keys, values = (x.flatten(2, 3) for x in unpack_codes(blocks, kv_format, torch.float64))
        if kv_format.bits == 16:
            values = values.masked_fill(past[..., None], 0)
            return cls(keys, values, None, lengths, kv_format)
        scales = torch.cat(unpack_scales(blocks, kv_format), dim=-1).flatten(2, 3).double()
        return cls(keys, values, scales.masked_fill(past[..., None], 0), lengths, kv_format)

    def attend(self, q: Tensor, scale: float, window: int | None) -> Tensor:
        """float64 [n, L, Hq * D] of the last L positions' q [n, L, Hq, D]."""
        positions = self.lengths[:, None] - q.shape[1] + torch.arange(q.shape[1])
        blocks = zip(q.split(QUERY_BLOCK, 1), positions.split(QUERY_BLOCK, 1), strict=True)
        return torch.cat([self._attend(*block, scale, window) for block in blocks], dim=1)

    def _attend(self, q: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
        length, kv_heads = q.shape[1], self.keys.shape[1]
        reached = self._first(int(positions.max()) + 1)
        grouped = q.double().unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        scores = reached._scores(grouped.flatten(2, 3)) * scale
        scores = scores.unflatten(2, (-1, length))
        hidden = ~_visible(positions, reached.keys.shape[2], window)
        scores.masked_fill_(hidden[:, None, None], -torch.inf)
        ordered = reached._weighted_values(scores.softmax(dim=-1).flatten(2, 3))
        natural = ordered[..., self.kv_format.value_channel_places]
        out: Tensor = natural.unflatten(2, (-1, length))
        return out.permute(0, 3, 1, 2, 4).flatten(2)

    def _first(self, length: int) -> _Contexts:
        """The contexts' first `length` tokens."""
        scales = None if self.scales is None else self.scales[:, :, :length]
        keys, values = self.keys[:, :, :length], self.values[:, :, :length]
        return _Contexts(keys, values, scales, self.lengths, self.kv_format)

    def _scores(self, queries: Tensor) -> Tensor:
        dots = queries[..., self.kv_format.key_channel_order] @ self.keys.transpose(-1, -2)
        if self.scales is None:
            return dots
        scale, offset = self.scales[..., None, :, 0], self.scales[..., None, :, 1]
        return dots * scale + queries.sum(dim=-1, keepdim=True) * offset

    def _weighted_values(self, weights: Tensor) -> Tensor:
        if self.scales is None:
            return weights @ self.values
        scale, offset = self.scales[..., None, :, 2], self.scales[..., 3:]
        return (weights * scale) @ self.values + weights @ offset


def _visible(positions: Tensor, context: int, window: int | None) -> Tensor:
    """Whether the query at each of positions i64 [n, L] sees each token, [n, L, context]."""
    query, key = positions[:, :, None], torch.arange(context)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
