"""RoPE, Hadamard, quantize and paged write on a GPU; contract and reference are in `kv_append`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.kernels.jit import Kernel
from qserve.kernels.op import OpError
from qserve.kernels.paged import PagedBatch

THREADS = 128


@dataclass(frozen=True)
class AppendShape:
    """What one variant of the kernel is compiled for; dtype is that of qkv and q.

    centered: whether a center is subtracted from the keys.
    """

    kv_format: KVFormat
    num_query_heads: int
    dtype: torch.dtype
    hadamard: bool
    centered: bool = False

    @property
    def warps_per_token(self) -> int:
        """Warps hold heads of one role: query, key or value."""
        heads_per_warp = 1024 // self.kv_format.head_dim
        query, kv = (
            -(-heads // heads_per_warp)
            for heads in (self.num_query_heads, self.kv_format.num_kv_heads)
        )
        return query + 2 * kv


def rope_append(
    qkv: Tensor,
    rope_table: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    num_query_heads: int,
    hadamard: bool,
    key_center: Tensor | None = None,
) -> Tensor:
    """See `kv_append.rope_append`; qkv is float16 or bfloat16."""
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise OpError(f"rope_append: on a GPU, {qkv.dtype} is not served")
    center = rope_table if key_center is None else key_center  # the table will not be read there
    tensors = (qkv, rope_table, center, batch.positions, batch.slots, pool)
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise OpError("rope_append: tensors must be contiguous")
    tokens = len(qkv)
    q = torch.empty(tokens, num_query_heads, kv_format.head_dim, dtype=qkv.dtype, device=qkv.device)
    if tokens:
        shape = AppendShape(kv_format, num_query_heads, qkv.dtype, hadamard, key_center is not None)
        grid = (-(-tokens * shape.warps_per_token * 32 // THREADS),)
        append_kernel(shape)(qkv.device, grid, (*tensors, q, tokens))
    return q


@cache
def append_kernel(shape: AppendShape) -> Kernel:
    """The variant for a cache format, a number of query heads and an activation type."""
    kv_format = shape.kv_format
    return Kernel(
        "kv_append.cu",
        "rope_append",
        parameters="(7Pi)",
        threads=THREADS,
        overlap=True,
        constants={
            "THREADS": THREADS,
            "BITS": kv_format.bits,
            "HEAD_DIM": kv_format.head_dim,
            "KV_HEADS": kv_format.num_kv_heads,
            "QUERY_HEADS": shape.num_query_heads,
            "HADAMARD": shape.hadamard,
            "CENTERED": shape.centered,
            "BFLOAT16": shape.dtype == torch.bfloat16,
            "PAGE_BFLOAT16": kv_format.dtype == torch.bfloat16,
        },
    )
