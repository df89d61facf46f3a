"""Attention of prefill chunks over quantized pages on a GPU without a kernel of its own for them.

Pages are dequantized into a workspace of bounded size, over which the library's varlen flash
attention runs: a few sequences, and where those are long a few heads, at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qserve.formats.kv import KVFormat
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.jit import Kernel
from qserve.kernels.paged import AttentionInputs, PagedBatch

WORKSPACE_BYTES = 256 * 2**20
"""Dequantized K and V at a time; a single head of a single sequence may take more."""

THREADS = 256


def attend(inputs: AttentionInputs, min_query_len: int, out: Tensor) -> int:
    """Fill the rows of out [T, Hq, D] whose sequences have at least `min_query_len` queries.

    Returns how many rows those are.
    """
    group = inputs.group
    plan = _plan(inputs.batch, inputs.kv_format, min_query_len)
    for run in plan.runs:
        for first in range(0, inputs.kv_format.num_kv_heads, plan.heads):
            heads = min(plan.heads, inputs.kv_format.num_kv_heads - first)
            where = (run.rows, slice(first * group, (first + heads) * group))
            keys, values = _gather(run, inputs, first, heads)
            _flash(out[where], inputs.q[where], keys, values, run, inputs)
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
    lengths = batch.known_lengths()
    chunks = [i for i, (queries, _) in enumerate(lengths) if queries >= min_query_len]
    longest = max((lengths[i][1] for i in chunks), default=1)
    head_bytes = 2 * kv_format.head_dim * 2
    heads = min(max(WORKSPACE_BYTES // (longest * head_bytes), 1), kv_format.num_kv_heads)
    limit = WORKSPACE_BYTES // (heads * head_bytes)
    starts = [0, *accumulate(queries for queries, _ in lengths)]
    runs = _runs([(i, lengths[i][1]) for i in chunks], limit)
    return _Plan([_make_run(batch, run, starts, lengths) for run in runs], heads)


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


def _make_run(
    batch: PagedBatch, run: range, starts: list[int], lengths: Sequence[tuple[int, int]]
) -> _Run:
    """Index tensors come from the batch's, on the device, which nobody waits for."""
    sequences = slice(run.start, run.stop)
    queries, contexts = zip(*lengths[sequences], strict=True)
    rows = slice(starts[run.start], starts[run.stop])
    key_ends = batch.context_lens[sequences].cumsum(0, dtype=torch.int32)
    return _Run(
        first=run.start,
        rows=rows,
        query_starts=batch.query_start[run.start : run.stop + 1] - rows.start,
        key_starts=functional.pad(key_ends, (1, 0)),
        tokens=sum(contexts),
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )


def _gather(
    run: _Run, inputs: AttentionInputs, first_head: int, heads: int
) -> tuple[Tensor, Tensor]:
    """K and V of a run's sequences, one after the other, [tokens, heads, D]."""
    pool, kv_format, dtype = inputs.pool, inputs.kv_format, inputs.q.dtype
    shape = (run.tokens, heads, kv_format.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=pool.device) for _ in range(2))
    grid = (-(-run.max_context_len // PAGE_TOKENS), heads, len(run.key_starts) - 1)
    table = inputs.batch.page_table[run.first :]
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
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, run: _Run, inputs: AttentionInputs
) -> None:
    """Into out [rows, heads, D], causal, the queries being each sequence's last positions."""
    window = inputs.window
    lengths = (run.query_starts, run.key_starts, run.max_query_len, run.max_context_len)
    options: dict[str, Any] = {
        "scale": inputs.scale,
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
        **_unsplit(),
    }
    dropout, causal, debug = 0.0, True, False
    arguments = (q, keys, values, *lengths, dropout, causal, debug)
    in_place = getattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace", None)
    if in_place is not None:
        in_place(out, *arguments, **options)
    else:  # before torch 2.11
        out.copy_(torch.ops.aten._flash_attention_forward(*arguments, **options)[0])


@cache
def _unsplit() -> dict[str, Any]:
    """No split-KV, whose splits would depend on the batch; older versions of the op have none."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return {"num_splits": 1} if any(a.name == "num_splits" for a in schema.arguments) else {}
