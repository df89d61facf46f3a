"""Attention of decode steps over quantized pages on a GPU: a work list, our kernel, and a sum.

The work list is made once per step, on the device, and serves every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.kernels.jit import Kernel, multiprocessors
from qserve.kernels.paged import AttentionInputs, PagedBatch

SPLIT_PAGES = 32
"""Pages after which a sequence is split: fixed, so that results do not depend on the batch."""

MAX_SPLITS = 32
"""Splits of one sequence at the most; longer ones have larger splits."""

QUERY_TILE = 8
"""Query heads that the tensor cores multiply at once."""

WORK_ITEM_INTS = 8
BLOCKS = 2
"""Blocks of a multiprocessor, which share its memory: as one ends, the next kernel's first pages are
on their way to the other's place."""

_READERS = 4
_BYTES_IN_FLIGHT = 8 << 10  # to a reader at a time, at the least
_RESERVED_BYTES = 1 << 10  # of shared memory, for every block


def attend(inputs: AttentionInputs, out: Tensor) -> None:
    """Fill the rows of out [T, Hq, D] whose sequences have one query."""
    plan = _launch_decode(inputs, out)
    if plan.max_splits > 1:
        _launch_combine(inputs, plan, out)


def _launch_decode(inputs: AttentionInputs, out: Tensor) -> DecodePlan:
    q, batch, kv_format, device = inputs.q, inputs.batch, inputs.kv_format, inputs.q.device
    heads, head_dim = q.shape[1:]
    key = ("decode", heads, head_dim, inputs.window)
    fresh = key not in batch.derived
    if fresh:
        batch.derived[key] = DecodePlan.build(batch, heads, head_dim, inputs.window)
    plan: DecodePlan = batch.derived[key]
    shape = DecodeShape(kv_format, heads, q.dtype, _shared_bytes(device), overlap=not fresh)
    work = (plan.items, plan.page_ids, plan.item_count, len(plan.items))
    sizes = (batch.page_table.shape[1], plan.max_splits, inputs.scale * math.log2(math.e))
    targets = (out, plan.partials, plan.partial_sums)
    arguments = (q, inputs.pool, batch.page_table, *work, *targets, *sizes)
    pieces = len(plan.items) * kv_format.num_kv_heads * shape.tiles
    blocks = min(pieces, BLOCKS * multiprocessors(device))
    decode_kernel(shape)(device, (blocks,), arguments)
    return plan


def _launch_combine(inputs: AttentionInputs, plan: DecodePlan, out: Tensor) -> None:
    heads, head_dim = out.shape[1:]
    sources = (plan.partials, plan.partial_sums, plan.splits, inputs.batch.query_start)
    grid = (len(plan.splits), heads // _combined_heads(heads))
    combine_kernel(heads, head_dim, out.dtype)(out.device, grid, (*sources, out, plan.max_splits))


@dataclass(frozen=True)
class DecodeShape:
    """What one variant of the decode kernel is compiled for; dtype is that of q and the output.

    shared_bytes: shared memory that a block alone on a multiprocessor may have. overlap: start
    before the preceding kernel has ended, which must not have made the work list.
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
        """Warps that read pages: as many as can work on one while another is on its way."""
        return min(_READERS, self._pages_that_fit // 2)

    @property
    def stages(self) -> int:
        """Pages in shared memory at a time: as many for each reader, whose own they are."""
        return self._pages_that_fit // self.readers * self.readers

    @property
    def in_flight(self) -> int:
        """Pages on their way to one reader at a time."""
        return -(-_BYTES_IN_FLIGHT // self.kv_format.block_bytes)

    @property
    def used_bytes(self) -> int:
        """Shared memory of a block; what it leaves, small kernels beside it may use."""
        return self.stages * self._stage_bytes

    @property
    def _stage_bytes(self) -> int:
        return self.kv_format.block_bytes + 3 * 8  # and three barriers

    @property
    def _pages_that_fit(self) -> int:
        share = (self.shared_bytes + _RESERVED_BYTES) // BLOCKS - _RESERVED_BYTES
        return share // self._stage_bytes


@cache
def decode_kernel(shape: DecodeShape) -> Kernel:
    """The variant for a cache format, its query heads and a device's shared memory."""
    return Kernel(
        "decode_attention.cu",
        "decode_attention",
        parameters="(6Pi3P2if)",
        threads=(shape.readers + 2) * 32,
        shared_bytes=shape.used_bytes,
        overlap=shape.overlap,
        constants={
            "BITS": shape.kv_format.bits,
            "HEAD_DIM": shape.kv_format.head_dim,
            "KV_HEADS": shape.kv_format.num_kv_heads,
            "GROUP": shape.group,
            "TILES": shape.tiles,
            "ROWS": shape.rows,
            "SPLIT_PAGES": SPLIT_PAGES,
            "WARPS": shape.readers,
            "BLOCKS": BLOCKS,
            "STAGES": shape.stages,
            "IN_FLIGHT": shape.in_flight,
            "SHARED_BYTES": shape.used_bytes,
            "BFLOAT16": shape.dtype == torch.bfloat16,
            "ARRIVING_LANES": 1,
        },
    )


@cache
def combine_kernel(num_query_heads: int, head_dim: int, dtype: torch.dtype) -> Kernel:
    """The variant that adds up splits, a few heads to a block."""
    heads = _combined_heads(num_query_heads)
    return Kernel(
        "decode_combine.cu",
        "decode_combine",
        parameters="(5Pi)",
        threads=heads * head_dim // 8,
        overlap=True,
        constants={
            "QUERY_HEADS": num_query_heads,
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "BFLOAT16": dtype == torch.bfloat16,
        },
    )


def _combined_heads(num_query_heads: int) -> int:
    """Query heads of a block that adds up."""
    return next(heads for heads in (4, 3, 2, 1) if num_query_heads % heads == 0)


@cache
def plan_kernel() -> Kernel:
    """The kernel that writes a step's work list."""
    return Kernel(
        "decode_plan.cu",
        "decode_plan",
        parameters="(7P3i)",
        threads=1024,
        constants={"SPLIT_PAGES": SPLIT_PAGES, "MAX_SPLITS": MAX_SPLITS},
    )


@dataclass(frozen=True)
class DecodePlan:
    """A step's work list, the same for every layer; see csrc/decode_plan.cu.

    items: int32 [capacity, 8]. page_ids: int32 [capacity, 32], of the items' first pages.
    item_count: int32 [1]. splits: int32 [B]. max_splits: a sequence's at the most.
    partials: float32 [B, max_splits, Hq, D], of splits yet to be combined; partial_sums: float32
    [B, max_splits, Hq, 2], their maxima and weights; both empty where no sequence can be split.
    """

    items: Tensor
    page_ids: Tensor
    item_count: Tensor
    splits: Tensor
    max_splits: int
    partials: Tensor
    partial_sums: Tensor

    @classmethod
    def build(cls, batch: PagedBatch, heads: int, head_dim: int, window: int | None) -> DecodePlan:
        """On the device, without the host waiting, for queries [T, heads, head_dim]."""
        sequences, pages = batch.page_table.shape
        device = batch.page_table.device
        max_splits = min(MAX_SPLITS, -(-pages // SPLIT_PAGES))
        parts = (sequences if max_splits > 1 else 0, max_splits, heads)
        plan = cls(
            items=_empty_ints(device, sequences * max_splits, WORK_ITEM_INTS),
            page_ids=_empty_ints(device, sequences * max_splits, SPLIT_PAGES),
            item_count=_empty_ints(device, 1),
            splits=_empty_ints(device, sequences),
            max_splits=max_splits,
            partials=torch.empty(*parts, head_dim, dtype=torch.float32, device=device),
            partial_sums=torch.empty(*parts, 2, dtype=torch.float32, device=device),
        )
        sources = (batch.context_lens, batch.query_start, batch.page_table)
        targets = (plan.items, plan.page_ids, plan.item_count, plan.splits)
        plan_kernel()(device, (1,), (*sources, *targets, sequences, pages, window or 0))
        return plan


def _empty_ints(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


@cache
def _shared_bytes(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    limit: int = properties.shared_memory_per_block_optin
    return limit
