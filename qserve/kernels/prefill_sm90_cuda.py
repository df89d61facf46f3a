"""Attention of prefill chunks straight from quantized pages on Hopper: the work list and the launch
of `csrc/prefill_attention_sm90.cu`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.jit import Kernel, device_arch, multiprocessors
from qserve.kernels.paged import AttentionInputs
from qserve.kernels.transfer import to_device
from qserve.kernels.wgmma import wgmma_half_source

TILE_ROWS = 128
"""Rows that a block attends at a time: queries times the query heads of one KV head."""

THREADS = 384
STAGES = {64: 6, 128: 4}
"""Pages in shared memory, by head dim."""

UNBOUNDED = 2**30
"""A window that hides nothing."""


def serves(inputs: AttentionInputs) -> bool:
    """Whether the device and the pages are what the kernel is for."""
    hopper = device_arch(inputs.q.device.index or 0) == "sm_90a"
    return hopper and inputs.kv_format.bits < 16 and inputs.group <= TILE_ROWS


def attend(inputs: AttentionInputs, out: Tensor) -> int:
    """Fill the rows of out [T, Hq, D] whose sequences have at least two queries.

    Returns how many rows those are.
    """
    batch, kv_format = inputs.batch, inputs.kv_format
    window = UNBOUNDED if inputs.window is None else inputs.window
    plan = _plan(inputs, window)
    works = len(plan.tiles) * kv_format.num_kv_heads
    if works:
        sizes = (batch.page_table.shape[1], works, window, inputs.scale * math.log2(math.e))
        arguments = (inputs.q, inputs.pool, batch.page_table, plan.tiles, out, *sizes)
        kernel = prefill_kernel(kv_format, inputs.group, inputs.q.dtype)
        kernel(out.device, (min(works, multiprocessors(out.device)),), arguments)
    return plan.rows


@dataclass(frozen=True)
class _Plan:
    """What a step's layers share.

    tiles: int32 [n, 4], each a sequence, its tile's first row in q, the position of that row, and
    queries; those with most pages first. rows: of q that the tiles cover.
    """

    tiles: Tensor
    rows: int


_Tile = tuple[int, int, int, int]


def _plan(inputs: AttentionInputs, window: int) -> _Plan:
    batch = inputs.batch
    key = ("prefill tiles", inputs.group, window)
    if key not in batch.derived:
        batch.derived[key] = _make_plan(
            batch.known_lengths(), TILE_ROWS // inputs.group, window, batch.context_lens.device
        )
    plan: _Plan = batch.derived[key]
    return plan


def _make_plan(
    lengths: Sequence[tuple[int, int]], queries: int, window: int, device: torch.device
) -> _Plan:
    """For tiles of as many queries."""
    tiles = sorted(_tiles(lengths, queries), key=lambda tile: -_pages(tile, window))
    table = to_device(tiles, device, torch.int32).reshape(-1, 4)
    return _Plan(table, sum(tile[3] for tile in tiles))


def _tiles(lengths: Sequence[tuple[int, int]], size: int) -> Iterator[_Tile]:
    row = 0
    for sequence, (queries, context) in enumerate(lengths):
        for start in range(0, queries if queries > 1 else 0, size):
            position = context - queries + start
            yield sequence, row + start, position, min(size, queries - start)
        row += queries


def _pages(tile: _Tile, window: int) -> int:
    """Pages that a tile looks at."""
    _, _, position, queries = tile
    first = max(position - window + 1, 0) // PAGE_TOKENS
    return (position + queries - 1) // PAGE_TOKENS + 1 - first


@cache
def prefill_kernel(kv_format: KVFormat, group: int, dtype: torch.dtype) -> Kernel:
    """The variant for a cache format, `group` query heads to a KV head, and q of `dtype`."""
    head_dim = kv_format.head_dim
    stages = STAGES[head_dim]
    page_bytes = 2 * (PAGE_TOKENS * head_dim * 2 + 16)  # tiles of K and V, their barriers
    shared_bytes = 1024 + stages * page_bytes + TILE_ROWS * head_dim * 2  # to align, pages, queries
    return Kernel(
        "prefill_attention_sm90.cu",
        "prefill_attention",
        parameters="(5P3if)",
        threads=THREADS,
        shared_bytes=shared_bytes,
        generated="".join(
            wgmma_half_source(columns) for columns in sorted({PAGE_TOKENS, head_dim})
        ),
        constants={
            "BITS": kv_format.bits,
            "HEAD_DIM": head_dim,
            "KV_HEADS": kv_format.num_kv_heads,
            "GROUP": group,
            "BFLOAT16": dtype == torch.bfloat16,
            "STAGES": stages,
            "SHARED_BYTES": shared_bytes,
            "ARRIVING_LANES": 1,
        },
    )
