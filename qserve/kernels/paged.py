"""What paged ops share: where a batch's tokens live, and what their ops take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.formats.layout import PAGE_TOKENS


@dataclass(frozen=True)
class PagedBatch:
    """T tokens of B sequences, flattened; a sequence's queries are its last positions.

    positions: int64 [T]. slots: int64 [T], page * 64 + offset, where each token's K and V go.
    query_start: int32 [B + 1], the sequences' first tokens. context_lens: int32 [B], tokens held
    once this batch's are appended. page_table: int32 [B, P], the sequences' pages in order.
    lengths: (queries, context) of each sequence as the host knows them; without them, prefill on a
    GPU waits for the device's.
    derived: what ops have worked out from these tensors for all layers; a step whose tensors hold
    something new is a new batch.
    """

    positions: Tensor
    slots: Tensor
    query_start: Tensor
    context_lens: Tensor
    page_table: Tensor
    max_query_len: int
    max_context_len: int
    lengths: tuple[tuple[int, int], ...] | None = None
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def known_lengths(self) -> tuple[tuple[int, int], ...]:
        """`lengths`; where there are none, the host waits for the device's."""
        if self.lengths is not None:
            return self.lengths
        queries = self.query_start.diff()
        return tuple(zip(queries.tolist(), self.context_lens.tolist(), strict=True))

    @classmethod
    def of_lengths(
        cls,
        queries: Sequence[int],
        contexts: Sequence[int],
        page_table: Tensor,
        device: torch.device | str,
    ) -> PagedBatch:
        """Sequences whose last `queries` of `contexts` tokens are the batch's; page_table as above,
        on the host."""
        positions = [
            torch.arange(context - count, context)
            for context, count in zip(contexts, queries, strict=True)
        ]
        slots = [
            pages[where // PAGE_TOKENS] * PAGE_TOKENS + where % PAGE_TOKENS
            for pages, where in zip(page_table.long(), positions, strict=True)
        ]
        return cls(
            positions=torch.cat(positions).to(device),
            slots=torch.cat(slots).to(device),
            query_start=torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            page_table=page_table.int().to(device),
            max_query_len=max(queries),
            max_context_len=max(contexts),
            lengths=tuple(zip(queries, contexts, strict=True)),
        )


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments of `attention.paged_attention`."""

    q: Tensor
    batch: PagedBatch
    pool: Tensor
    kv_format: KVFormat
    scale: float
    window: int | None

    @property
    def num_query_heads(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_query_heads // self.kv_format.num_kv_heads


@dataclass(frozen=True)
class AppendInputs:
    """The arguments of `kv_append.rope_append`."""

    qkv: Tensor
    rope_table: Tensor
    batch: PagedBatch
    pool: Tensor
    kv_format: KVFormat
    num_query_heads: int
    hadamard: bool
    key_center: Tensor | None
