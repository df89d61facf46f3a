"""RoPE, Hadamard, quantize and paged write on a GPU; contract and reference are in `kv_append`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.kernels.jit import Kernel
from qserve.kernels.op import OpError
from qserve.kernels.paged import AppendInputs

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

    @classmethod
    def of(cls, inputs: AppendInputs) -> AppendShape:
        """The variant for these arguments."""
        return cls(
            inputs.kv_format,
            inputs.num_query_heads,
            inputs.qkv.dtype,
            inputs.hadamard,
            inputs.key_center is not None,
        )

    @property
    def warps_per_token(self) -> int:
        """Warps hold heads of one role: query, key or value."""
        heads_per_warp = 512 // self.kv_format.head_dim
        query, kv = (
            -(-heads // heads_per_warp)
            for heads in (self.num_query_heads, self.kv_format.num_kv_heads)
        )
        return query + 2 * kv


def rope_append(inputs: AppendInputs) -> Tensor:
    """See `kv_append.rope_append`; qkv is float16 or bfloat16."""
    qkv, table, batch = inputs.qkv, inputs.rope_table, inputs.batch
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise OpError(f"rope_append: on a GPU, {qkv.dtype} is not served")
    center = table if inputs.key_center is None else inputs.key_center  # then it will not be read
    tensors = (qkv, table, center, batch.positions, batch.slots, inputs.pool)
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise OpError("rope_append: tensors must be contiguous")
    shape = AppendShape.of(inputs)
    heads, head_dim = shape.num_query_heads, shape.kv_format.head_dim
    q = torch.empty(len(qkv), heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        grid = (-(-len(qkv) * shape.warps_per_token * 32 // THREADS),)
        append_kernel(shape)(qkv.device, grid, (*tensors, q, len(qkv)))
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
