"""From a step's plan to the tensors the model runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qserve.engine.scheduler import ScheduledChunk, StepPlan
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.paged import PagedBatch


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of one step, flattened over its chunks.

    token_ids: int64 [T]. sample_rows: int64 [S], the rows whose logits choose a next token.
    """

    token_ids: Tensor
    paged: PagedBatch
    sample_rows: Tensor


def build_batch(plan: StepPlan, device: torch.device) -> ForwardBatch:
    """Must be called before the plan is committed: it reads the sequences' tokens and pages."""
    chunks = plan.chunks
    starts = [0, *accumulate(chunk.length for chunk in chunks)]
    sample_rows = [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.samples]
    return ForwardBatch(
        token_ids=to_device([token for chunk in chunks for token in _tokens(chunk)], device),
        paged=_paged_batch(chunks, starts, device),
        sample_rows=to_device(sample_rows, device),
    )


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of host values; on a GPU it is on its way without the host waiting for it."""
    pinned = device.type != "cpu"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def _paged_batch(
    chunks: tuple[ScheduledChunk, ...], starts: list[int], device: torch.device
) -> PagedBatch:
    context_lens = [chunk.start + chunk.length for chunk in chunks]
    positions = [position for chunk in chunks for position in _positions(chunk)]
    slots = [slot for chunk in chunks for slot in _slots(chunk)]
    return PagedBatch(
        positions=to_device(positions, device),
        slots=to_device(slots, device),
        query_start=to_device(starts, device, torch.int32),
        context_lens=to_device(context_lens, device, torch.int32),
        page_table=to_device(_page_table(chunks), device, torch.int32),
        max_query_len=max(chunk.length for chunk in chunks),
        max_context_len=max(context_lens),
    )


def _positions(chunk: ScheduledChunk) -> range:
    return range(chunk.start, chunk.start + chunk.length)


def _tokens(chunk: ScheduledChunk) -> list[int]:
    return chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]


def _slots(chunk: ScheduledChunk) -> Iterator[int]:
    pages = chunk.sequence.pages
    for position in _positions(chunk):
        yield pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS


def _page_table(chunks: tuple[ScheduledChunk, ...]) -> list[list[int]]:
    """Rows of equal length; what pads them is never read."""
    width = max(len(chunk.sequence.pages) for chunk in chunks)
    pages = [chunk.sequence.pages for chunk in chunks]
    return [row + [0] * (width - len(row)) for row in pages]
