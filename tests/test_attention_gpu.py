"""Attention over quantized pages on a GPU, against float64 over the same bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from qserve.formats.activation import QuantizedActivation
from qserve.formats.kv import KVFormat
from qserve.kernels import (
    OpError,
    PagedBatch,
    paged_attention,
    paged_attention_quantize,
    quantize_per_token,
    rope_append,
)
from qserve.testing.paging import (
    attention_in_double,
    poison,
    random_batch,
    random_pool,
    relative_errors,
)

pytestmark = pytest.mark.gpu

HEADS = [(32, 8), (8, 8), (16, 2), (7, 1), (28, 4), (32, 2), (12, 1)]
RAGGED = [1, 63, 64, 65, 777, 2049, 3000, 1280]
NUM_PAGES = 160
LIMIT = 1e-3


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs and partial results start as NaN, so that what is never written shows."""
    allocate, allocate_like = torch.empty, torch.empty_like

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: allocate_like(tensor).fill_(math.nan))
    yield


def assert_equal(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    assert all(torch.equal(part, vars(expected)[name]) for name, part in vars(found).items())


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
    from_device = dataclasses.replace(batch, lengths=None, derived={})
    assert torch.equal(out, paged_attention(q, from_device, pool, kv_format, dim**-0.5, window))
    quantized = paged_attention_quantize(q, batch, pool, kv_format, dim**-0.5, window)
    assert_equal(quantized, quantize_per_token(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
def test_decode(query_heads: int, kv_heads: int, bits: int, dim: int, dtype: torch.dtype) -> None:
    kv_format = KVFormat(bits, dim, kv_heads)
    check(kv_format, query_heads, RAGGED, [1] * len(RAGGED), LIMIT, dtype)


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


def test_a_captured_step_follows_its_inputs() -> None:
    """Append, attention and its int8 output, over two layers, with other lengths, pages and rows in
    use at every replay."""
    kv_format, rows, width = KVFormat(4, 128, 8), 6, 50
    scratch, pages = NUM_PAGES, NUM_PAGES + 1
    table = torch.rand(width * 64, 128, device="cuda")
    static = PagedBatch(
        positions=torch.zeros(rows, dtype=torch.int64, device="cuda"),
        slots=torch.full((rows,), scratch * 64, dtype=torch.int64, device="cuda"),
        query_start=torch.arange(rows + 1, dtype=torch.int32, device="cuda"),
        context_lens=torch.zeros(rows, dtype=torch.int32, device="cuda"),
        page_table=torch.zeros(rows, width, dtype=torch.int32, device="cuda"),
        max_query_len=1,
        max_context_len=width * 64,
    )
    qkv = torch.randn(2, rows, 48 * 128, device="cuda", dtype=torch.float16)
    pools = [random_pool(kv_format, pages, "cuda") for _ in range(2)]

    def step(batch: PagedBatch, pools: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = []
        for layer, pool in enumerate(pools):
            heads = qkv[layer, : len(batch.slots)]
            q = rope_append(heads, table, batch, pool, kv_format, 32, hadamard=True)
            quantized = paged_attention_quantize(q, batch, pool, kv_format, 128**-0.5)
            outputs += [decode(batch, q, pool), *vars(quantized).values()]
        return outputs

    step(dataclasses.replace(static, derived={}), pools)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(dataclasses.replace(static, derived={}), pools)
    for contexts in ([3000, 1, 200], [70, 2900, 640, 65, 64, 2049], [3200]):
        used = len(contexts)
        batch = random_batch(contexts, [1] * used, NUM_PAGES, "cuda")
        static.context_lens.zero_()[:used] = batch.context_lens
        static.page_table[:used, : batch.page_table.shape[1]] = batch.page_table
        static.positions.zero_()[:used] = batch.positions
        static.slots.fill_(scratch * 64)[:used] = batch.slots
        copies = [pool.clone() for pool in pools]
        graph.replay()
        for output, expected in zip(outputs, step(batch, copies), strict=True):
            assert torch.equal(output[:used], expected)
            assert not output[used:].any()
        for pool, copy in zip(pools, copies, strict=True):
            assert torch.equal(pool[:scratch], copy[:scratch])


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


def test_attention_refuses_what_it_does_not_serve() -> None:
    kv_format = KVFormat(4, 64, 1)
    batch = random_batch([5], [1], 1, "cuda")
    pool = random_pool(kv_format, 1, "cuda")
    with pytest.raises(OpError, match="float32 is not served"):
        paged_attention(torch.randn(1, 1, 64, device="cuda"), batch, pool, kv_format, 0.125)
