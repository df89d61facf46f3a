"""Attention over quantized pages on a GPU; contract and reference are in `attention`.

Sequences with one query (decode steps) go to our kernel, which reads the packed pages as they are.
Those with more (prefill chunks), and 16-bit pages, are the business of `prefill_cuda`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.kernels import prefill_cuda
from qserve.kernels.jit import Kernel
from qserve.kernels.op import OpError
from qserve.kernels.paged import PagedBatch

SPLIT_PAGES = 32
"""Pages after which a sequence is split: fixed, so that results do not depend on the batch."""

MAX_SPLITS = 32
"""Splits of one sequence at the most; longer ones have larger splits."""

QUERY_TILE = 8
"""Query heads that the tensor cores multiply at once."""

WORK_ITEM_INTS = 8
_READERS = 8
_MERGERS = 4
_MAX_PAGES_PER_READER = 3


def paged_attention(
    q: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `attention.paged_attention`; q is float16 or bfloat16."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise OpError(f"paged_attention: on a GPU, {q.dtype} is not served")
    if not (q.is_contiguous() and pool.is_contiguous() and batch.page_table.is_contiguous()):
        raise OpError("paged_attention: q, pool and page_table must be contiguous")
    out = torch.empty_like(q)
    done = 0
    if batch.max_query_len > 1 or kv_format.bits == 16:
        min_query_len = 1 if kv_format.bits == 16 else 2
        done = prefill_cuda.attend(q, batch, pool, kv_format, scale, window, min_query_len, out)
    if done < len(q):
        _decode(q, batch, pool, kv_format, scale, window, out)
    return out.flatten(1)


@dataclass(frozen=True)
class DecodeShape:
    """What one variant of the decode kernel is compiled for; dtype is that of q and the output.

    shared_bytes: shared memory that a block may have. overlap: start before the preceding kernel
    has ended, which must not have made the work list.
    """

    kv_format: KVFormat
    num_query_heads: int
    dtype: torch.dtype
    shared_bytes: int
    overlap: bool

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_query_heads // self.kv_format.num_kv_heads

    @property
    def tiles(self) -> int:
        """Tiles of at most `QUERY_TILE` query heads per KV head."""
        return -(-self.group // QUERY_TILE)

    @property
    def rows(self) -> int:
        """Query heads of a tile."""
        return -(-self.group // self.tiles)

    @property
    def readers(self) -> int:
        """Warps that read pages: as many as can have one each on its way."""
        return _READERS if self._pages_that_fit(_READERS) >= _READERS else _READERS // 2

    @property
    def stages(self) -> int:
        """Pages in shared memory at a time: as many for each reader, whose own they are."""
        readers = self.readers
        return min(self._pages_that_fit(readers) // readers, _MAX_PAGES_PER_READER) * readers

    @property
    def used_bytes(self) -> int:
        """Shared memory of a block; what it leaves, small kernels beside it may use."""
        return self.readers * self._deposit_bytes + self.stages * self._stage_bytes + 16

    @property
    def _stage_bytes(self) -> int:
        return self.kv_format.block_bytes + 16

    @property
    def _deposit_bytes(self) -> int:
        return self.rows * ((self.kv_format.head_dim + 4) * 4 + 8) + 16

    def _pages_that_fit(self, readers: int) -> int:
        return (self.shared_bytes - readers * self._deposit_bytes - 16) // self._stage_bytes


@cache
def decode_kernel(shape: DecodeShape) -> Kernel:
    """The variant for a cache format, its query heads and a device's shared memory."""
    return Kernel(
        "decode_attention.cu",
        "decode_attention",
        parameters="(5Pi3P2if)",
        threads=(shape.readers + _MERGERS + 1) * 32,
        shared_bytes=shape.used_bytes,
        overlap=shape.overlap,
        constants={
            "BITS": shape.kv_format.bits,
            "HEAD_DIM": shape.kv_format.head_dim,
            "KV_HEADS": shape.kv_format.num_kv_heads,
            "GROUP": shape.group,
            "TILES": shape.tiles,
            "ROWS": shape.rows,
            "WARPS": shape.readers,
            "MERGERS": _MERGERS,
            "STAGES": shape.stages,
            "SHARED_BYTES": shape.used_bytes,
            "BFLOAT16": shape.dtype == torch.bfloat16,
        },
    )


@cache
def combine_kernel(num_query_heads: int, head_dim: int, dtype: torch.dtype) -> Kernel:
    """The variant that adds up splits; a block takes four query heads of a sequence."""
    return Kernel(
        "decode_combine.cu",
        "decode_combine",
        parameters="(5Pi)",
        threads=128,
        overlap=True,
        constants={
            "QUERY_HEADS": num_query_heads,
            "HEAD_DIM": head_dim,
            "BFLOAT16": dtype == torch.bfloat16,
        },
    )


@cache
def plan_kernel() -> Kernel:
    """The kernel that writes a step's work list."""
    return Kernel(
        "decode_plan.cu",
        "decode_plan",
        parameters="(5P2i)",
        threads=1024,
        constants={"SPLIT_PAGES": SPLIT_PAGES, "MAX_SPLITS": MAX_SPLITS},
    )


@dataclass(frozen=True)
class DecodePlan:
    """A step's work list, the same for every layer; see csrc/decode_plan.cu.

    items: int32 [capacity, 8]. item_count: int32 [1]. splits: int32 [B]. max_splits: a sequence's at
    the most. partials: float32 [B * max_splits * Hq * (D + 2)], of splits yet to be combined.
    """

    items: Tensor
    item_count: Tensor
    splits: Tensor
    max_splits: int
    partials: Tensor

    @classmethod
    def build(cls, batch: PagedBatch, row_elements: int, window: int | None) -> DecodePlan:
        """On the device, without the host waiting. row_elements: Hq * (D + 2)."""
        sequences, pages = batch.page_table.shape
        device = batch.page_table.device
        max_splits = min(MAX_SPLITS, -(-pages // SPLIT_PAGES))
        partials = sequences * max_splits * row_elements if max_splits > 1 else 0
        plan = cls(
            items=_empty_ints(device, sequences * max_splits, WORK_ITEM_INTS),
            item_count=_empty_ints(device, 1),
            splits=_empty_ints(device, sequences),
            max_splits=max_splits,
            partials=torch.empty(partials, dtype=torch.float32, device=device),
        )
        pointers = (batch.context_lens, batch.query_start, plan.items, plan.item_count, plan.splits)
        plan_kernel()(device, (1,), (*pointers, sequences, window or 0))
        return plan


def _empty_ints(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def _decode(
    q: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    heads, head_dim, device = q.shape[1], q.shape[2], q.device
    key = ("decode", heads, head_dim, window)
    fresh = key not in batch.derived
    if fresh:
        batch.derived[key] = DecodePlan.build(batch, heads * (head_dim + 2), window)
    plan: DecodePlan = batch.derived[key]
    shape = DecodeShape(kv_format, heads, q.dtype, _shared_bytes(device), overlap=not fresh)
    outputs = len(plan.splits) * plan.max_splits * heads * head_dim
    partials = (plan.partials, plan.partials[outputs:]) if plan.max_splits > 1 else (None, None)
    inputs = (q, pool, batch.page_table, plan.items, plan.item_count, len(plan.items))
    sizes = (batch.page_table.shape[1], plan.max_splits, scale * math.log2(math.e))
    decode_kernel(shape)(device, (_multiprocessors(device),), (*inputs, out, *partials, *sizes))
    if plan.max_splits > 1:
        grid = (-(-heads // 4), len(plan.splits))
        arguments = (*partials, plan.splits, batch.query_start, out, plan.max_splits)
        combine_kernel(heads, head_dim, q.dtype)(device, grid, arguments)


@cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def _shared_bytes(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    limit: int = properties.shared_memory_per_block_optin
    return limit
