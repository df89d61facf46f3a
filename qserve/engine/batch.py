"""From a step's plan to the tensors the model runs on.

All of a step's indices lie in one buffer, filled on the host and moved to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qserve.engine.scheduler import ScheduledChunk, StepPlan
from qserve.engine.sequence import Sequence
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.paged import PagedBatch

ON_DEVICE = -1
"""Stands for a token that only the device knows."""

_ALIGNMENT = 256

Lengths = tuple[tuple[int, int], ...]


class StepTensors(NamedTuple):
    """T tokens of one step, flattened over B chunks of sequences.

    token_ids: int64 [T], `ON_DEVICE` where the step before sampled the token; sources: int64 [T],
    where it is then found (see `LatestTokens`), else 0. sample_rows: int64 [S], the rows whose
    logits choose a next token. The others are as in `PagedBatch`.
    """

    token_ids: Tensor
    sources: Tensor
    positions: Tensor
    slots: Tensor
    sample_rows: Tensor
    query_start: Tensor
    context_lens: Tensor
    page_table: Tensor


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step's tensors: T tokens of B sequences, P columns of the page table, S samples.

    max_query_len, max_context_len: as in `PagedBatch`.
    """

    tokens: int
    sequences: int
    pages: int
    samples: int
    max_query_len: int
    max_context_len: int

    @classmethod
    def of(cls, plan: StepPlan) -> StepShape:
        """As large as the plan needs."""
        chunks = plan.chunks
        return cls(
            tokens=plan.num_tokens,
            sequences=len(chunks),
            pages=max(len(chunk.sequence.pages) for chunk in chunks),
            samples=len(plan.sampled),
            max_query_len=max(chunk.length for chunk in chunks),
            max_context_len=max(chunk.end for chunk in chunks),
        )

    @classmethod
    def of_decodes(cls, sequences: int, pages: int) -> StepShape:
        """One token of each sequence, all sampled, over page tables of `pages` columns."""
        return cls(sequences, sequences, pages, sequences, 1, pages * PAGE_TOKENS)

    @cached_property
    def nbytes(self) -> int:
        """Of the buffer that holds the tensors."""
        return sum(_aligned(prod(shape) * dtype.itemsize) for dtype, shape in self._fields)

    def views(self, buffer: Tensor) -> StepTensors:
        """The tensors in a buffer, uint8 [nbytes or more]."""
        tensors, start = [], 0
        for dtype, shape in self._fields:
            size = prod(shape) * dtype.itemsize
            tensors.append(buffer[start : start + size].view(dtype).view(shape))
            start += _aligned(size)
        return StepTensors(*tensors)

    def paged(self, tensors: StepTensors, lengths: Lengths | None) -> PagedBatch:
        """A fresh batch, of which ops have worked nothing out yet; `lengths` as in `PagedBatch`."""
        return PagedBatch(
            positions=tensors.positions,
            slots=tensors.slots,
            query_start=tensors.query_start,
            context_lens=tensors.context_lens,
            page_table=tensors.page_table,
            max_query_len=self.max_query_len,
            max_context_len=self.max_context_len,
            lengths=lengths,
        )

    @cached_property
    def _fields(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """In the order of `StepTensors`."""
        tokens, sequences = (torch.int64, (self.tokens,)), self.sequences
        return (
            *[tokens] * 4,
            (torch.int64, (self.samples,)),
            (torch.int32, (sequences + 1,)),
            (torch.int32, (sequences,)),
            (torch.int32, (sequences, self.pages)),
        )


def stage(
    plan: StepPlan,
    shape: StepShape,
    sources: Mapping[Sequence, int],
    scratch_page: int,
    pinned: bool,
) -> Tensor:
    """A buffer on the host with the plan's indices, uint8 [shape.nbytes].

    sources: where the device keeps the tokens that sequences were given by the step before. Rows and
    columns beyond the plan's are sequences of one token each, on `scratch_page`.
    Must be called before the plan is committed: it reads the sequences' tokens and pages.
    """
    buffer = torch.empty(shape.nbytes, dtype=torch.uint8, pin_memory=pinned)
    fields = _HostFields(*(tensor.numpy() for tensor in shape.views(buffer)))
    starts = _padded((chunk.start for chunk in plan.chunks), shape.sequences, 0)
    lengths = _padded((chunk.length for chunk in plan.chunks), shape.sequences, 1)
    ends = lengths.cumsum()
    fields.query_start[0], fields.query_start[1:] = 0, ends
    fields.context_lens[:] = starts + lengths
    fields.positions[:] = np.arange(shape.tokens) + (starts - ends + lengths).repeat(lengths)
    _fill_page_table(fields.page_table, plan.chunks, scratch_page)
    rows, positions = np.arange(shape.sequences).repeat(lengths), fields.positions
    pages = fields.page_table[rows, positions // PAGE_TOKENS].astype(np.int64)
    fields.slots[:] = pages * PAGE_TOKENS + positions % PAGE_TOKENS
    _fill_tokens(fields, plan.chunks, sources)
    samples = np.fromiter((chunk.samples for chunk in plan.chunks), bool, len(plan.chunks))
    fields.sample_rows[: len(plan.sampled)] = ends[: len(samples)][samples] - 1
    return buffer


class _HostFields(NamedTuple):
    """`StepTensors` as arrays over the same memory."""

    token_ids: np.ndarray
    sources: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    sample_rows: np.ndarray
    query_start: np.ndarray
    context_lens: np.ndarray
    page_table: np.ndarray


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _padded(values: Iterable[int], size: int, padding: int) -> np.ndarray:
    given = np.fromiter(values, np.int64)
    return np.concatenate((given, np.full(size - len(given), padding)))


def _fill_page_table(
    table: np.ndarray, chunks: Iterable[ScheduledChunk], scratch_page: int
) -> None:
    pages = [chunk.sequence.pages for chunk in chunks]
    counts = np.zeros(len(table), np.int64)
    counts[: len(pages)] = [len(row) for row in pages]
    table[:] = scratch_page
    table[np.arange(table.shape[1]) < counts[:, None]] = np.fromiter(chain(*pages), np.int32)


def _fill_tokens(
    fields: _HostFields, chunks: Iterable[ScheduledChunk], sources: Mapping[Sequence, int]
) -> None:
    fields.sources[:] = 0
    token_ids: list[int] = []
    for chunk in chunks:
        known = chunk.sequence.token_ids[chunk.start : chunk.end]
        token_ids += known
        if len(known) < chunk.length:  # by one: only the last step's token is not known yet
            fields.sources[len(token_ids)] = sources[chunk.sequence]
            token_ids.append(ON_DEVICE)
    fields.token_ids[: len(token_ids)] = token_ids
    fields.token_ids[len(token_ids) :] = 0


class LatestTokens:
    """What the latest step sampled, where the next one reads it: on the device.

    sources: the place of each sequence's token among `tokens`, int64 [1 + capacity]; the first
    place holds `ON_DEVICE`, which no token is less than.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.tokens = torch.full((1 + capacity,), ON_DEVICE, device=device)
        self.sources: dict[Sequence, int] = {}

    def put(self, sequences: Iterable[Sequence], token_ids: Tensor) -> None:
        """Forget the step before; `token_ids`, int64 [S], are the tokens of `sequences`."""
        self.tokens[1 : 1 + len(token_ids)] = token_ids
        self.sources = {sequence: place for place, sequence in enumerate(sequences, start=1)}

    def resolve(self, tensors: StepTensors) -> Tensor:
        """The step's token ids, [T], none of them missing."""
        return torch.maximum(tensors.token_ids, self.tokens[tensors.sources])
