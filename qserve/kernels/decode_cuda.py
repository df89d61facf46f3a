"""Attention of decode steps over quantized pages on a GPU: a work list, our kernel, and its end.

The work list is made once per step, on the device, and serves every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.formats.kv import KVFormat
from qserve.kernels.fused import quantize_per_token
from qserve.kernels.jit import Kernel
from qserve.kernels.paged import AttentionInputs, PagedBatch

SPLIT_PAGES = 32
"""Pages after which a sequence is split: fixed, so that results do not depend on the batch."""

MAX_SPLITS = 32
"""Splits of one sequence at the most; longer ones have larger splits."""

QUERY_TILE = 8
"""Query heads that the tensor cores multiply at once."""

WORK_ITEM_INTS = 8
_READERS = 8
_MERGERS = {64: 2, 128: 4}  # by head dim, as measured
_MAX_PAGES_PER_READER = 3
_MAX_COMBINE_THREADS = 512


def attend(inputs: AttentionInputs, out: Tensor) -> None:
    """Fill the rows of out [T, Hq, D] whose sequences have one query."""
    plan = _launch_decode(inputs, out)
    if plan.max_splits > 1:
        _launch_combine(inputs, plan, out, None)


def attend_quantize(inputs: AttentionInputs) -> QuantizedActivation:
    """Attention of sequences with one query each, as int8 per token: [T, Hq * D].

    A token's heads are spread over the blocks, and its scale needs them all: a second launch, which
    where sequences may be split is the one that adds up.
    """
    out = torch.empty_like(inputs.q)
    plan = _launch_decode(inputs, out)
    if plan.max_splits == 1:
        return quantize_per_token(out.flatten(1))
    rows, heads, head_dim = out.shape
    quantized = QuantizedActivation.empty(rows, heads * head_dim, out.device)
    _launch_combine(inputs, plan, out, quantized)
    return quantized


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
    decode_kernel(shape)(device, (_multiprocessors(device),), arguments)
    return plan


def _launch_combine(
    inputs: AttentionInputs, plan: DecodePlan, out: Tensor, quantized: QuantizedActivation | None
) -> None:
    heads, head_dim = out.shape[1:]
    sources = (plan.partials, plan.partial_sums, plan.splits, inputs.batch.query_start, out)
    targets: tuple[Tensor | None, ...] = (None, None, None)
    blocks = heads // _combined_heads(heads)
    if quantized is not None:
        targets, blocks = (quantized.codes, quantized.scale, quantized.row_sum), 1
    kernel = combine_kernel(heads, head_dim, out.dtype, quantized is not None)
    kernel(out.device, (len(plan.splits), blocks), (*sources, plan.max_splits, *targets))


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
    def mergers(self) -> int:
        """Warps that combine what the readers found."""
        return _MERGERS[self.kv_format.head_dim]

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
        parameters="(6Pi3P2if)",
        threads=(shape.readers + shape.mergers + 1) * 32,
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
            "MERGERS": shape.mergers,
            "STAGES": shape.stages,
            "SHARED_BYTES": shape.used_bytes,
            "BFLOAT16": shape.dtype == torch.bfloat16,
        },
    )


@cache
def combine_kernel(
    num_query_heads: int, head_dim: int, dtype: torch.dtype, quantize: bool
) -> Kernel:
    """The variant that adds up splits, a few heads to a block, or that makes a row int8."""
    heads = num_query_heads if quantize else _combined_heads(num_query_heads)
    columns = heads * head_dim
    threads = min(-(-columns // (8 * 32)) * 32, _MAX_COMBINE_THREADS)
    return Kernel(
        "decode_combine.cu",
        "decode_combine",
        parameters="(5Pi3P)",
        threads=threads,
        overlap=True,
        constants={
            "QUERY_HEADS": num_query_heads,
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "COLUMNS": columns,
            "THREADS": threads,
            "QUANTIZE": quantize,
            "BFLOAT16": dtype == torch.bfloat16,
        },
    )


def _combined_heads(num_query_heads: int) -> int:
    """Query heads of a block that only adds up."""
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
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def _shared_bytes(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    limit: int = properties.shared_memory_per_block_optin
    return limit
