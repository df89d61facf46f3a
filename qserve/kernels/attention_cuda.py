"""Attention over quantized pages on a GPU; contract and reference are in `attention`.

Sequences with one query (decode steps) go to our kernel, which reads the packed pages as they are.
Those with more (prefill chunks) go to one that does so too on Hopper (`prefill_sm90_cuda`); elsewhere,
and over 16-bit pages, they are the business of `prefill_cuda`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.kernels import decode_cuda, prefill_cuda, prefill_sm90_cuda
from qserve.kernels.op import OpError
from qserve.kernels.paged import AttentionInputs


def paged_attention(inputs: AttentionInputs) -> Tensor:
    """See `attention.paged_attention`; q is float16 or bfloat16."""
    _require_served(inputs)
    out = torch.empty_like(inputs.q)
    done = 0
    if not _decodes_only(inputs):
        done = _prefill(inputs, out)
    if done < len(out):
        decode_cuda.attend(inputs, out)
    return out.flatten(1)


def _prefill(inputs: AttentionInputs, out: Tensor) -> int:
    """Fill the rows of out that are not the decode kernel's; returns how many those are."""
    if prefill_sm90_cuda.serves(inputs):
        return prefill_sm90_cuda.attend(inputs, out)
    return prefill_cuda.attend(inputs, 1 if inputs.kv_format.bits == 16 else 2, out)


def _decodes_only(inputs: AttentionInputs) -> bool:
    return inputs.batch.max_query_len <= 1 and inputs.kv_format.bits < 16


def _require_served(inputs: AttentionInputs) -> None:
    q, pool, page_table = inputs.q, inputs.pool, inputs.batch.page_table
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise OpError(f"paged_attention: on a GPU, {q.dtype} is not served")
    if not (q.is_contiguous() and pool.is_contiguous() and page_table.is_contiguous()):
        raise OpError("paged_attention: q, pool and page_table must be contiguous")
