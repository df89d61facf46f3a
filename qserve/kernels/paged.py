"""Where a batch's tokens live: the index tensors that paged ops share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """T tokens of B sequences, flattened; a sequence's queries are its last positions.

    positions: int64 [T]. slots: int64 [T], page * 64 + offset, where each token's K and V go.
    query_start: int32 [B + 1], the sequences' first tokens. context_lens: int32 [B], tokens held
    once this batch's are appended. page_table: int32 [B, P], the sequences' pages in order.
    """

    positions: Tensor
    slots: Tensor
    query_start: Tensor
    context_lens: Tensor
    page_table: Tensor
    max_query_len: int
    max_context_len: int
