"""Attention of prompt chunks over quantized pages on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.kernels import PagedBatch, paged_attention, prefill_cuda, prefill_sm90_cuda
from qserve.testing.paging import (
    attention_in_double,
    pages_of,
    poison,
    random_batch,
    random_pool,
)

pytestmark = pytest.mark.gpu

LIMIT = {torch.float16: 1.5e-3, torch.bfloat16: 3e-3}  # rounding to bfloat16 alone makes 1.6e-3


def attend(
    q: Tensor, batch: PagedBatch, pool: Tensor, kv_format: KVFormat, **options: int
) -> Tensor:
    return paged_attention(q, batch, pool, kv_format, kv_format.head_dim**-0.5, **options)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of devices older than Hopper."""
    monkeypatch.setattr(prefill_sm90_cuda, "serves", lambda _: False)


@pytest.mark.parametrize(
    ("bits", "dim", "query_heads", "kv_heads", "dtype"),
    [
        (4, 128, 32, 8, torch.float16),
        (4, 128, 28, 4, torch.bfloat16),
        (4, 64, 12, 1, torch.float16),
        (8, 128, 8, 8, torch.float16),
        (8, 64, 7, 1, torch.bfloat16),
    ],
)
def test_chunks(bits: int, dim: int, query_heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    kv_format, num_pages = KVFormat(bits, dim, kv_heads), 120
    contexts, queries = [300, 65, 128, 1000, 70, 64, 2049], [300, 2, 100, 64, 70, 63, 700]
    batch = random_batch(contexts, queries, num_pages, "cuda")
    pool = random_pool(kv_format, num_pages, "cuda")
    poison(pool, kv_format, batch)
    q = torch.randn(sum(queries), query_heads, dim, device="cuda").to(dtype)
    expected = attention_in_double(q, batch, pool, kv_format, dim**-0.5)
    out = attend(q, batch, pool, kv_format)
    assert ((out - expected).norm(dim=1) / expected.norm(dim=1)).max() < LIMIT[dtype]
    for _ in range(3):
        assert torch.equal(attend(q, replace(batch, derived={}), pool, kv_format), out)


@pytest.mark.parametrize(
    ("bits", "dim", "query_heads", "kv_heads", "window", "dtype"),
    [
        (4, 128, 32, 8, None, torch.float16),
        (4, 64, 12, 1, 300, torch.float16),
        (8, 128, 8, 8, None, torch.float16),
        (8, 64, 7, 1, 300, torch.bfloat16),
    ],
)
def test_a_row_does_not_depend_on_how_its_prompt_is_cut(
    bits: int, dim: int, query_heads: int, kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    """Bit for bit, and whatever shares its step."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the library's attention gives no such promise")
    kv_format, context = KVFormat(bits, dim, kv_heads), 1500
    num_pages = pages_of(context) + 20
    batch = random_batch([context], [context], num_pages, "cuda")
    pool = random_pool(kv_format, num_pages, "cuda")
    q = torch.randn(context, query_heads, dim, device="cuda").to(dtype)
    options = {} if window is None else {"window": window}
    whole = attend(q, batch, pool, kv_format, **options)
    for size in (64, 211, 1000):
        for start in range(0, context, size):
            rows = slice(start, min(start + size, context))
            count = rows.stop - start
            table = batch.page_table.cpu().repeat(2, 1)
            chunk = PagedBatch.of_lengths([count, 70], [rows.stop, 70], table, "cuda")
            queries = torch.cat((q[rows], q[:70]))
            out = attend(queries, chunk, pool, kv_format, **options)
            assert torch.equal(out[:count], whole[rows]), (size, start)
            assert torch.equal(out[count:], whole[:70])


def test_gathered_chunks(gathered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_cuda, "WORKSPACE_BYTES", 3 * 1000 * 128 * 4)
    kv_format, num_pages = KVFormat(4, 128, 8), 60
    contexts, queries = [900, 64, 1000, 200, 300], [300, 64, 100, 2, 1]
    batch = random_batch(contexts, queries, num_pages, "cuda")
    pool = random_pool(kv_format, num_pages, "cuda")
    poison(pool, kv_format, batch)
    q = torch.randn(sum(queries), 32, 128, device="cuda", dtype=torch.float16)
    expected = attention_in_double(q, batch, pool, kv_format, 128**-0.5)
    out = attend(q, batch, pool, kv_format)
    assert not math.isnan(float(out.sum()))
    assert ((out - expected).norm(dim=1) / expected.norm(dim=1)).max() < 2e-3
