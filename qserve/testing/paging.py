"""Batches over quantized pages for tests and benchmarks, and attention over them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat, dequantize_blocks
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.paged import PagedBatch


def pages_of(context: int) -> int:
    """Pages that hold `context` tokens."""
    return -(-context // PAGE_TOKENS)


def random_batch(
    contexts: Sequence[int],
    queries: Sequence[int],
    num_pages: int,
    device: torch.device | str = "cpu",
) -> PagedBatch:
    """Sequences of these context lengths on disjoint pages in random order, appending their last
    `queries` tokens; `num_pages` must suffice for all."""
    pages = torch.randperm(num_pages)
    table = torch.zeros(len(contexts), max(map(pages_of, contexts)), dtype=torch.int64)
    starts = [0, *accumulate(map(pages_of, contexts))]
    for row, context in enumerate(contexts):
        table[row, : pages_of(context)] = pages[starts[row] : starts[row + 1]]
    return PagedBatch.of_lengths(queries, contexts, table, device)


def random_pool(kv_format: KVFormat, num_pages: int, device: torch.device | str = "cpu") -> Tensor:
    """A pool of random keys and values of about unit size."""
    pool = kv_format.new_pool(num_pages, device)
    if kv_format.bits == 16:
        values = pool.view(kv_format.dtype)
        values.copy_(torch.randn(values.shape, dtype=kv_format.dtype, device=device))
        return pool
    pool.random_()
    scales = pool[..., 2 * kv_format.code_bytes :].view(torch.float16).unflatten(-1, (-1, 2))
    span = torch.rand(scales.shape[:-1], device=device) * 3 + 2
    scales[..., 0] = span / (2**kv_format.bits - 1)
    scales[..., 1] = span * (torch.rand_like(span) * 0.4 - 0.7)
    return pool


def poison(pool: Tensor, kv_format: KVFormat, batch: PagedBatch) -> None:
    """Make NaN of all scales (of 16-bit pages: values) that no token of the batch owns."""
    owned = torch.zeros(len(pool), PAGE_TOKENS, dtype=torch.bool)
    for row, context in zip(batch.page_table.tolist(), batch.context_lens.tolist(), strict=True):
        for index, page in enumerate(row[: pages_of(context)]):
            owned[page, : context - index * PAGE_TOKENS] = True
    stray = ~owned.to(pool.device)[:, None, None, :, None]
    data = pool[..., 2 * kv_format.code_bytes :] if kv_format.bits < 16 else pool
    dtype = torch.float16 if kv_format.bits < 16 else kv_format.dtype
    by_token = data.view(dtype).unflatten(-1, (2, PAGE_TOKENS, -1))
    by_token.copy_(by_token.masked_fill(stray, torch.nan))


def attention_in_double(
    q: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """What `paged_attention` should return, float64 [T, Hq * D], the plainest way."""
    starts = batch.query_start.tolist()
    outputs = []
    for row, context in enumerate(batch.context_lens.tolist()):
        pages = batch.page_table[row, : pages_of(context)].long()
        keys, values = (
            x.transpose(1, 2).flatten(0, 1)[:context]
            for x in dequantize_blocks(pool[pages], kv_format)
        )
        outputs.append(_attend(q[starts[row] : starts[row + 1]], keys, values, scale, window))
    return torch.cat(outputs)


def relative_errors(out: Tensor, expected: Tensor) -> Tensor:
    """Of each row, in the l2 norm and relative to the row: what is left of the squared error without
    the one that rounding the exact row to out's type makes, which in bfloat16 is 1.6e-3 by itself."""
    error, rounding = out.double() - expected, expected.to(out.dtype).double() - expected
    own = error.square().sum(dim=1) - rounding.square().sum(dim=1)
    errors: Tensor = own.clamp(min=0).sqrt() / expected.norm(dim=1)
    return errors


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    length, heads, _ = q.shape
    context, kv_heads, _ = keys.shape
    grouped = q.double().unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.einsum("lhgd,chd->hglc", grouped, keys) * scale
    query = torch.arange(context - length, context, device=q.device)[:, None]
    key = torch.arange(context, device=q.device)
    hidden = (key > query) | (key <= query - (window or context))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hglc,chd->lhgd", weights, values).flatten(1)
