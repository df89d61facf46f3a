"""RoPE, optional Hadamard, quantize and paged write of a batch's K and V: one launch on a GPU."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qserve.formats.kv import KVFormat, write_tokens
from qserve.kernels.op import FLOAT_DTYPES, Contract
from qserve.kernels.paged import AppendInputs, PagedBatch


def rope_append(
    qkv: Tensor,
    rope_table: Tensor,
    batch: PagedBatch,
    pool: Tensor,
    kv_format: KVFormat,
    num_query_heads: int,
    hadamard: bool = False,
    key_center: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, write k and v into their pages, return q.

    qkv: float [T, (Hq + 2 Hkv) * D]. rope_table: float32 [P, D], cosines then sines (NeoX halves).
    pool: uint8 [num_pages, Hkv, block_bytes], written in place at batch.slots.
    hadamard: multiply q and k by the orthonormal Hadamard matrix of size D after RoPE, which
    leaves q . k as it is and spreads K's outliers before they are quantized.
    key_center: float32 [Hkv, D] or None, subtracted from every key after RoPE: all of a query's
    scores move alike, which softmax does not see, and the keys' common part need not be quantized.
    Returns q [T, Hq, D] in qkv's dtype.
    """
    head_dim, kv_heads = kv_format.head_dim, kv_format.num_kv_heads
    contract = Contract("rope_append")
    width = (num_query_heads + 2 * kv_heads) * head_dim
    contract.check("qkv", qkv, ("T", width), *FLOAT_DTYPES)
    contract.check("rope_table", rope_table, ("P", head_dim), torch.float32)
    contract.check("positions", batch.positions, ("T",), torch.int64)
    contract.check("slots", batch.slots, ("T",), torch.int64)
    contract.check("pool", pool, ("pages", kv_heads, kv_format.block_bytes), torch.uint8)
    if key_center is not None:
        contract.check("key_center", key_center, (kv_heads, head_dim), torch.float32)
    if qkv.is_cuda:
        from qserve.kernels import kv_append_cuda

        options = (kv_format, num_query_heads, hadamard, key_center)
        return kv_append_cuda.rope_append(AppendInputs(qkv, rope_table, batch, pool, *options))
    heads: Tensor = qkv.float().unflatten(-1, (-1, head_dim))
    queries_and_keys, values = heads.split((num_query_heads + kv_heads, kv_heads), dim=1)
    rotated = apply_rope(queries_and_keys, rope_table[batch.positions])
    queries, keys = rotated[:, :num_query_heads], rotated[:, num_query_heads:]
    if key_center is not None:
        keys = keys - key_center
    if hadamard:
        queries, keys = apply_hadamard(queries), apply_hadamard(keys)
    write_tokens(pool, kv_format, batch.slots, keys, values)
    return queries.to(qkv.dtype)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by its tokens' cos_sin [T, D], pairing channels i and i + D/2."""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def apply_hadamard(x: Tensor) -> Tensor:
    """x [..., D] times the orthonormal Sylvester-Hadamard matrix, summed in float64; D = 2^n."""
    return (x.double() @ _hadamard(x.shape[-1]).to(x.device)).to(x.dtype)


@lru_cache(maxsize=4)
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)
