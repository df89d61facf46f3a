"""Attention of prefill chunks over quantized pages on a GPU.

Pages are dequantized into a workspace of bounded size, over which the library's varlen flash
attention runs: a few sequences, and where those are long a few heads, at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.jit import Kernel
from qserve.kernels.paged import PagedBatch

WORKSPACE_BYTES = 256 * 2**20
"""Dequantized K and V at a time; a single head of a single sequence may take more."""

THREADS = 256


def attend(
    q: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    scale: float,
    window: int | None,
    min_query_len: int,
    out: Tensor,
) -> int:
    """Fill the rows of out [T, Hq, D] whose sequences have at least `min_query_len` queries.

    q: [T, Hq, D]. Returns how many rows those are. The first call for a batch waits for its lengths.
    """
    group = q.shape[1] // kv_format.num_kv_heads
    plan = _plan(batch, kv_format, min_query_len)
    for run in plan.runs:
        for first in range(0, kv_format.num_kv_heads, plan.heads):
            heads = min(plan.heads, kv_format.num_kv_heads - first)
            where = (run.rows, slice(first * group, (first + heads) * group))
            keys, values = _gather(run, batch, pool, kv_format, q.dtype, first, heads)
            out[where] = _flash(q[where], keys, values, run, scale, window)
    return sum(run.rows.stop - run.rows.start for run in plan.runs)


@dataclass(frozen=True)
class _Run:
    """Neighbouring sequences whose K and V are in the workspace together.

    first: the first sequence. rows: their queries. query_starts, key_starts: int32 [n + 1].
    """

    first: int
    rows: slice
    query_starts: Tensor
    key_starts: Tensor
    tokens: int
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True)
class _Plan:
    """The runs of a batch, each attended `heads` KV heads at a time."""

    runs: list[_Run]
    heads: int


def _plan(batch: PagedBatch, kv_format: KVFormat, min_query_len: int) -> _Plan:
    key = ("prefill", kv_format, min_query_len)
    if key not in batch.derived:
        batch.derived[key] = _make_plan(batch, kv_format, min_query_len)
    plan: _Plan = batch.derived[key]
    return plan


def _make_plan(batch: PagedBatch, kv_format: KVFormat, min_query_len: int) -> _Plan:
    sequences = len(batch.context_lens)
    lengths = torch.cat((batch.query_start, batch.context_lens)).tolist()
    starts, contexts = lengths[: sequences + 1], lengths[sequences + 1 :]
    chunks = [
        (index, contexts[index])
        for index in range(sequences)
        if starts[index + 1] - starts[index] >= min_query_len
    ]
    longest = max((context for _, context in chunks), default=1)
    head_bytes = 2 * kv_format.head_dim * 2
    heads = min(max(WORKSPACE_BYTES // (longest * head_bytes), 1), kv_format.num_kv_heads)
    limit = WORKSPACE_BYTES // (heads * head_bytes)
    device = batch.page_table.device
    runs = [_make_run(run, starts, contexts, device) for run in _runs(chunks, limit)]
    return _Plan(runs, heads)


def _runs(chunks: list[tuple[int, int]], limit: int) -> Iterator[range]:
    """Ranges of neighbouring sequences of at most `limit` tokens; chunks: (sequence, context)."""
    first, tokens, end = 0, 0, -1
    for sequence, context in chunks:
        if sequence != end or tokens + context > limit:
            if tokens:
                yield range(first, end)
            first, tokens = sequence, 0
        tokens, end = tokens + context, sequence + 1
    if tokens:
        yield range(first, end)


def _make_run(run: range, starts: list[int], contexts: list[int], device: torch.device) -> _Run:
    rows = slice(starts[run.start], starts[run.stop])
    query_starts = [start - rows.start for start in starts[run.start : run.stop + 1]]
    key_starts = [0, *accumulate(contexts[run.start : run.stop])]
    return _Run(
        first=run.start,
        rows=rows,
        query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
        key_starts=torch.tensor(key_starts, dtype=torch.int32, device=device),
        tokens=key_starts[-1],
        max_query_len=max(end - start for start, end in pairwise(query_starts)),
        max_context_len=max(contexts[run.start : run.stop]),
    )


def _gather(
    run: _Run,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    dtype: torch.dtype,
    first_head: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """K and V of a run's sequences, one after the other, [tokens, heads, D]."""
    shape = (run.tokens, heads, kv_format.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=pool.device) for _ in range(2))
    grid = (-(-run.max_context_len // PAGE_TOKENS), heads, len(run.key_starts) - 1)
    table = batch.page_table[run.first :]
    arguments = (pool, table, run.key_starts, keys, values, table.shape[1], first_head, heads)
    gather_kernel(kv_format, dtype)(pool.device, grid, arguments)
    return keys, values


@cache
def gather_kernel(kv_format: KVFormat, dtype: torch.dtype) -> Kernel:
    """The variant that reads a cache format and writes `dtype`."""
    return Kernel(
        "page_gather.cu",
        "page_gather",
        parameters="(5P3i)",
        threads=THREADS,
        constants={
            "THREADS": THREADS,
            "BITS": kv_format.bits,
            "HEAD_DIM": kv_format.head_dim,
            "KV_HEADS": kv_format.num_kv_heads,
            "BFLOAT16": dtype == torch.bfloat16,
            "PAGE_BFLOAT16": kv_format.dtype == torch.bfloat16,
        },
    )


def _flash(
    q: Tensor, keys: Tensor, values: Tensor, run: _Run, scale: float, window: int | None
) -> Tensor:
    """Causal, the queries being each sequence's last positions: [rows, heads, D]."""
    output: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        keys,
        values,
        run.query_starts,
        run.key_starts,
        run.max_query_len,
        run.max_context_len,
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        **_unsplit(),
    )[0]
    return output


@cache
def _unsplit() -> dict[str, Any]:
    """No split-KV, whose splits would depend on the batch; older versions of the op have none."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return {"num_splits": 1} if any(a.name == "num_splits" for a in schema.arguments) else {}
