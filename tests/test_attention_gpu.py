"""Attention over quantized pages on a GPU, against float64 over the same bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from qserve.formats.kv import KVFormat
from qserve.kernels import OpError, PagedBatch, paged_attention, prefill_cuda
from qserve.testing.paging import attention_in_double, poison, random_batch, random_pool

pytestmark = pytest.mark.gpu

HEADS = [(32, 8), (8, 8), (16, 2), (7, 1), (28, 4), (32, 2), (12, 1)]
RAGGED = [1, 63, 64, 65, 777, 2049, 3000, 1280]
NUM_PAGES = 160
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 2.5e-3}  # rounding to bfloat16 alone makes 1.6e-3


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs and partial results start as NaN, so that what is never written shows."""
    allocate, allocate_like = torch.empty, torch.empty_like

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr("qserve.kernels.attention_cuda.torch.empty", poisoned)
    monkeypatch.setattr(
        "qserve.kernels.attention_cuda.torch.empty_like",
        lambda tensor: allocate_like(tensor).fill_(math.nan),
    )
    yield


def relative_errors(out: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """One per row."""
    return (out.double() - expected).norm(dim=1) / expected.norm(dim=1)


def check(
    kv_format: KVFormat,
    query_heads: int,
    contexts: list[int],
    queries: list[int],
    limit: float,
    dtype: torch.dtype = torch.float16,
    window: int | None = None,
    spread: float = 1.0,
    num_pages: int = NUM_PAGES,
) -> None:
    batch = random_batch(contexts, queries, num_pages, "cuda")
    pool = random_pool(kv_format, num_pages, "cuda")
    poison(pool, kv_format, batch)
    dim = kv_format.head_dim
    q = (torch.randn(sum(queries), query_heads, dim, device="cuda") * spread).to(dtype)
    out = paged_attention(q, batch, pool, kv_format, dim**-0.5, window)
    expected = attention_in_double(q, batch, pool, kv_format, dim**-0.5, window)
    assert out.dtype == dtype
    assert relative_errors(out, expected).max() < limit
    assert torch.equal(out, paged_attention(q, batch, pool, kv_format, dim**-0.5, window))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
def test_decode(query_heads: int, kv_heads: int, bits: int, dim: int, dtype: torch.dtype) -> None:
    kv_format = KVFormat(bits, dim, kv_heads)
    check(kv_format, query_heads, RAGGED, [1] * len(RAGGED), LIMIT[dtype], dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("window", [1, 64, 100, 2500])
def test_decode_in_a_window(window: int, bits: int) -> None:
    check(KVFormat(bits, 128, 2), 8, RAGGED, [1] * len(RAGGED), 1e-3, window=window)


def test_decode_of_peaked_scores() -> None:
    check(KVFormat(4, 128, 8), 32, RAGGED, [1] * len(RAGGED), 1e-3, spread=5.0)


@pytest.mark.parametrize("context", [32768, 131071])
def test_decode_of_a_long_context(context: int) -> None:
    check(KVFormat(4, 128, 1), 4, [context, 100], [1, 1], 1e-3, num_pages=2100)


def decode(batch: PagedBatch, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    return paged_attention(q, batch, pool, KVFormat(4, 128, 8), 128**-0.5)


def only(batch: PagedBatch, row: int) -> PagedBatch:
    """One sequence of a decode batch, alone."""
    pages = -(-int(batch.context_lens[row]) // 64)
    return PagedBatch(
        batch.positions[row : row + 1],
        batch.slots[row : row + 1],
        batch.query_start[:2],
        batch.context_lens[row : row + 1],
        batch.page_table[row : row + 1, :pages].contiguous(),
        1,
        int(batch.context_lens[row]),
    )


def test_decode_does_not_depend_on_the_batch() -> None:
    contexts = torch.randint(1, 6000, (64,)).tolist()
    contexts[5] = 5000
    num_pages = 64 * 94
    batch = random_batch(contexts, [1] * 64, num_pages, "cuda")
    pool = random_pool(KVFormat(4, 128, 8), num_pages, "cuda")
    q = torch.randn(64, 32, 128, device="cuda", dtype=torch.float16)
    together = decode(batch, q, pool)
    for row in (0, 5, 17, 63):
        alone = decode(only(batch, row), q[row : row + 1].contiguous(), pool)
        assert torch.equal(alone[0], together[row])


def test_decode_in_a_graph_follows_its_inputs() -> None:
    pool = random_pool(KVFormat(4, 128, 8), NUM_PAGES, "cuda")
    first, second = (
        random_batch(contexts, [1, 1, 1], NUM_PAGES, "cuda")
        for contexts in ([3000, 1, 200], [70, 2900, 640])
    )
    static = dataclasses.replace(
        first, context_lens=first.context_lens.clone(), page_table=first.page_table.clone()
    )
    q = torch.randn(3, 32, 128, device="cuda", dtype=torch.float16)
    decode(dataclasses.replace(static, derived={}), q, pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = dataclasses.replace(static, derived={})
        outputs = [decode(step, q, pool) for _ in range(3)]
    for batch in (second, first):
        static.context_lens.copy_(batch.context_lens)
        static.page_table.zero_()[:, : batch.page_table.shape[1]] = batch.page_table
        graph.replay()
        expected = decode(batch, q, pool)
        assert all(torch.equal(output, expected) for output in outputs)


def test_sequences_without_context_give_zeros() -> None:
    batch = random_batch([64, 500], [1, 1], NUM_PAGES, "cuda")
    batch.context_lens[0] = 0
    pool = random_pool(KVFormat(4, 128, 8), NUM_PAGES, "cuda")
    q = torch.randn(2, 32, 128, device="cuda", dtype=torch.float16)
    out = decode(batch, q, pool)
    assert not out[0].any() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", [None, 150])
def test_chunks_and_decodes_in_one_batch(
    window: int | None, dim: int, bits: int, dtype: torch.dtype
) -> None:
    contexts, queries = [300, 65, 128, 1000, 1, 70, 64], [300, 1, 100, 2, 1, 70, 1]
    limit = 2e-3 if dtype == torch.float16 else 1e-2
    check(KVFormat(bits, dim, 2, dtype), 8, contexts, queries, limit, dtype, window)


def test_chunks_in_a_small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_cuda, "WORKSPACE_BYTES", 3 * 1000 * 128 * 4)
    contexts, queries = [900, 64, 1000, 200, 300], [300, 64, 100, 2, 1]
    check(KVFormat(4, 128, 8), 32, contexts, queries, 2e-3)


def test_attention_refuses_what_it_does_not_serve() -> None:
    kv_format = KVFormat(4, 64, 1)
    batch = random_batch([5], [1], 1, "cuda")
    pool = random_pool(kv_format, 1, "cuda")
    with pytest.raises(OpError, match="float32 is not served"):
        paged_attention(torch.randn(1, 1, 64, device="cuda"), batch, pool, kv_format, 0.125)
