"""Attention over quantized pages, for decode steps and prefill chunks in one batch.

Scores follow the bytes in the pages: `q . k = scale * (q . code) + offset * sum(q)`, so dequantized
K and V never exist. Prefill reads the pages it has just written, as decode does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat, unpack_codes, unpack_scales
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.op import FLOAT_DTYPES, Contract
from qserve.kernels.paged import PagedBatch


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
    kv_heads, head_dim = kv_format.num_kv_heads, kv_format.head_dim
    contract = Contract("paged_attention")
    contract.check("q", q, ("T", "Hq", head_dim), *FLOAT_DTYPES)
    contract.check("pool", pool, ("pages", kv_heads, kv_format.block_bytes), torch.uint8)
    contract.check("page_table", batch.page_table, ("B", "P"), torch.int32)
    contract.check("context_lens", batch.context_lens, ("B",), torch.int32)
    contract.require(q.shape[1] % kv_heads == 0, f"{q.shape[1]} heads over {kv_heads} KV heads")
    if q.is_cuda:
        from qserve.kernels import attention_cuda

        return attention_cuda.paged_attention(q, batch, pool, kv_format, scale, window)
    out = torch.empty(q.shape[0], q.shape[1] * head_dim, dtype=q.dtype)
    starts = batch.query_start.tolist()
    for index, context in enumerate(batch.context_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        pages = batch.page_table[index, : -(-context // PAGE_TOKENS)].long()
        context_kv = _Context.read(pool[pages], kv_format, context)
        out[rows] = context_kv.attend(q[rows], scale, window).to(q.dtype)
    return out


@dataclass(frozen=True)
class _Context:
    """One sequence's K and V: codes float64 [Hkv, C, D], K in `key_channel_order`.

    scales: float64 [Hkv, C, 4], the scale and offset of K, then of V; None for 16-bit pages.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor | None
    key_channel_order: Tensor

    @classmethod
    def read(cls, blocks: Tensor, kv_format: KVFormat, length: int) -> _Context:
        """From the sequence's blocks u8 [pages, Hkv, block_bytes]."""

        def in_order(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).flatten(1, 2)[:, :length]

        keys, values = map(in_order, unpack_codes(blocks, kv_format, torch.float64))
        scales = None
        if kv_format.bits < 16:
            scales = in_order(torch.cat(unpack_scales(blocks, kv_format), dim=-1)).double()
        return cls(keys, values, scales, kv_format.key_channel_order)

    def attend(self, q: Tensor, scale: float, window: int | None) -> Tensor:
        """float64 [L, Hq * D] of the last L positions' q [L, Hq, D]."""
        length, heads, head_dim = q.shape
        kv_heads = self.keys.shape[0]
        grouped = q.double().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        queries = grouped.reshape(kv_heads, -1, head_dim)
        scores = self._scores(queries) * scale
        scores = scores.unflatten(1, (-1, length)).masked_fill_(
            ~self._visible(length, window), -torch.inf
        )
        weights = scores.softmax(dim=-1).flatten(1, 2)
        out = self._weighted_values(weights).unflatten(1, (-1, length))
        return out.permute(2, 0, 1, 3).reshape(length, heads * head_dim)

    def _scores(self, queries: Tensor) -> Tensor:
        dots = queries[..., self.key_channel_order] @ self.keys.transpose(1, 2)
        if self.scales is None:
            return dots
        scale, offset = self.scales[:, None, :, 0], self.scales[:, None, :, 1]
        return dots * scale + queries.sum(dim=-1, keepdim=True) * offset

    def _weighted_values(self, weights: Tensor) -> Tensor:
        if self.scales is None:
            return weights @ self.values
        scale, offset = self.scales[:, None, :, 2], self.scales[:, :, 3:]
        return (weights * scale) @ self.values + weights @ offset

    def _visible(self, length: int, window: int | None) -> Tensor:
        context = self.keys.shape[1]
        query = torch.arange(context - length, context)[:, None]
        key = torch.arange(context)[None]
        visible = key <= query
        return visible if window is None else visible & (key > query - window)
