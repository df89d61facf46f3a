"""Where a batch's tokens live: the index tensors that paged ops share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """T tokens of B sequences, flattened; a sequence's queries are its last positions.

    positions: int64 [T]. slots: int64 [T], page * 64 + offset, where each token's K and V go.
    query_start: int32 [B + 1], the sequences' first tokens. context_lens: int32 [B], tokens held
    once this batch's are appended. page_table: int32 [B, P], the sequences' pages in order.
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
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
