"""The paged kernels' own code, run on a CPU under random schedules: append, plan, decode, gather,
prefill."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from emulator import EmulationError, Emulator
from torch import Tensor

from qserve.formats.kv import KVFormat, dequantize_blocks, unpack_codes
from qserve.kernels import (
    PagedBatch,
    decode_cuda,
    jit,
    kv_append_cuda,
    prefill_cuda,
    prefill_sm90_cuda,
    rope_append,
)
from qserve.kernels.decode_cuda import MAX_SPLITS, SPLIT_PAGES, DecodePlan, DecodeShape
from qserve.kernels.jit import Kernel
from qserve.kernels.paged import AppendInputs, AttentionInputs
from qserve.testing.paging import (
    attention_in_double,
    pages_of,
    poison,
    random_batch,
    random_pool,
    relative_errors,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HOPPER, ADA = 227 * 1024, 99 * 1024


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """Every kernel launched in this module runs here."""
    emulator = Emulator(tmp_path_factory.mktemp("emulator"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "CSRC", emulator.sources)
        patch.setattr(Kernel, "__call__", lambda *arguments: emulator.launch(*arguments))
        yield emulator


def random_qkv(batch: PagedBatch, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    scales = 10 ** torch.empty(len(batch.slots), 1).uniform_(-2, 2)
    qkv = (torch.randn(len(batch.slots), heads * dim) * scales).to(dtype)
    qkv[0] = 2.5
    return qkv


@pytest.mark.parametrize(
    ("bits", "dim", "query_heads", "kv_heads", "dtype", "hadamard", "centered"),
    [
        (4, 128, 7, 1, torch.float16, False, False),
        (4, 128, 7, 1, torch.float16, True, True),
        (4, 64, 9, 3, torch.bfloat16, False, True),
        (8, 128, 8, 8, torch.bfloat16, False, False),
        (8, 64, 9, 3, torch.float16, True, False),
        (16, 64, 4, 2, torch.bfloat16, False, True),
    ],
)
def test_append(
    emulator: Emulator,
    bits: int,
    dim: int,
    query_heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    hadamard: bool,
    centered: bool,
) -> None:
    kv_format = KVFormat(bits, dim, kv_heads, dtype)
    center = torch.randn(kv_heads, dim) if centered else None
    batch = random_batch([1, 64, 65, 90], [1, 1, 65, 20], num_pages=8)
    qkv = random_qkv(batch, query_heads + 2 * kv_heads, dim, dtype)
    angles = torch.rand(100, dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    pool = random_pool(kv_format, 8)
    expected_pool = pool.clone()
    options = (kv_format, query_heads, hadamard, center)
    expected = rope_append(qkv, table, batch, expected_pool, *options)
    q = kv_append_cuda.rope_append(AppendInputs(qkv, table, batch, pool, *options))
    if not hadamard:
        assert torch.equal(q, expected) and torch.equal(pool, expected_pool)
        return
    torch.testing.assert_close(q, expected, rtol=0.01, atol=1e-4)
    for found, wanted in zip(
        unpack_codes(pool, kv_format, torch.float32),
        unpack_codes(expected_pool, kv_format, torch.float32),
        strict=True,
    ):
        difference = (found - wanted).abs()
        assert difference.max() <= (1 if bits < 16 else 0.01 * wanted.abs().max())
        assert (difference > 0).float().mean() < 1e-3


def plan(contexts: list[int], queries: list[int], window: int | None = None) -> list[list[int]]:
    """The work list: sequence, row, first page, pages, begin, end, split, splits."""
    batch = random_batch(contexts, queries, sum(map(pages_of, contexts)) + 1)
    made = DecodePlan.build(batch, 1, 64, window)
    done = slice(int(made.item_count))
    for item, ids in zip(made.items[done].tolist(), made.page_ids[done].tolist(), strict=True):
        sequence, first, pages = item[0], item[2], min(item[3], SPLIT_PAGES)
        assert ids[:pages] == batch.page_table[sequence, first : first + pages].tolist()
    return made.items[done].tolist()


@pytest.mark.parametrize("window", [None, 1, 64, 5000])
def test_the_work_list_covers_every_visible_page_once(
    emulator: Emulator, window: int | None
) -> None:
    contexts = [1, 64, 65, 64 * SPLIT_PAGES, 64 * SPLIT_PAGES + 1, 9000, 200_000, 77]
    queries = [1, 1, 1, 1, 1, 1, 1, 5]
    items = plan(contexts, queries, window)
    sizes = [item[3] for item in items]
    assert sizes == sorted(sizes, reverse=True)
    for sequence, context in enumerate(contexts[:-1]):
        own = sorted((item for item in items if item[0] == sequence), key=lambda item: item[6])
        begin = max(0, context - (window or context))
        pages = [page for item in own for page in range(item[2], item[2] + item[3])]
        assert pages == list(range(begin // 64, pages_of(context)))
        assert all(item[1] == sequence and item[4:6] == [begin, context] for item in own)
        assert [item[6:] for item in own] == [[i, len(own)] for i in range(len(own))]
        assert len(own) <= MAX_SPLITS and min(item[3] for item in own) > 0
        if len(pages) <= SPLIT_PAGES * MAX_SPLITS:
            assert max(item[3] for item in own) <= SPLIT_PAGES
    assert not any(item[0] == len(contexts) - 1 for item in items), "a chunk, not a decode"


def test_splits_do_not_depend_on_the_batch(emulator: Emulator) -> None:
    together = [item[2:] for item in plan([70, 5000, 900], [1, 1, 1]) if item[0] == 1]
    assert sorted(together) == sorted(item[2:] for item in plan([5000], [1]))


def decode(
    monkeypatch: pytest.MonkeyPatch,
    shape: DecodeShape,
    contexts: list[int],
    window: int | None = None,
    blocks: int = 3,
) -> float:
    """The largest relative error of a row; unused scales and outputs start as NaN."""
    monkeypatch.setattr(decode_cuda, "multiprocessors", lambda _: blocks)
    monkeypatch.setattr(decode_cuda, "_shared_bytes", lambda _: shape.shared_bytes)
    kv_format, num_pages = shape.kv_format, sum(map(pages_of, contexts)) + 2
    batch = random_batch(contexts, [1] * len(contexts), num_pages)
    pool = random_pool(kv_format, num_pages)
    poison(pool, kv_format, batch)
    dim = kv_format.head_dim
    q = torch.randn(len(contexts), shape.num_query_heads, dim).to(shape.dtype)
    out = torch.full_like(q, math.nan)
    inputs = AttentionInputs(q, batch, pool, kv_format, dim**-0.5, window)
    decode_cuda.attend(inputs, out)
    expected = attention_in_double(q, batch, pool, kv_format, dim**-0.5, window)
    return float(relative_errors(out.flatten(1), expected).max())


@pytest.mark.parametrize(
    ("bits", "dim", "query_heads", "kv_heads", "dtype", "shared_bytes"),
    [
        (4, 128, 2, 2, torch.float16, HOPPER),
        (4, 64, 12, 1, torch.bfloat16, HOPPER),
        (8, 64, 3, 1, torch.float16, HOPPER),
        (8, 128, 7, 1, torch.bfloat16, ADA),
    ],
)
def test_decode(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    dim: int,
    query_heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    shared_bytes: int,
) -> None:
    shape = DecodeShape(
        KVFormat(bits, dim, kv_heads), query_heads, dtype, shared_bytes, overlap=True
    )
    assert decode(monkeypatch, shape, [1, 63, 64, 65, 2200]) < 1e-3
    assert decode(monkeypatch, shape, [1, 300], window=100, blocks=1) < 1e-3


@pytest.mark.parametrize("longest_copy", [1, 300, 30_000])
@pytest.mark.parametrize("seed", range(2))
def test_decode_under_any_schedule(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, seed: int, longest_copy: int
) -> None:
    monkeypatch.setattr(emulator, "seed", seed)
    monkeypatch.setattr(emulator, "longest_copy", longest_copy)
    shape = DecodeShape(KVFormat(4, 128, 2), 2, torch.float16, HOPPER, overlap=True)
    assert decode(monkeypatch, shape, [1900, 64, 640, 1, 1280], blocks=1) < 1e-3


def test_a_stage_shared_by_readers_is_caught(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator sees what the kernel's static assertion forbids."""
    ring = emulator.sources / "page_ring.cuh"
    intact = ring.read_text()
    ring.write_text(intact.replace("static_assert", "// static_assert"))
    monkeypatch.setattr(DecodeShape, "stages", 11)
    monkeypatch.setattr(emulator, "longest_copy", 100_000)
    shape = DecodeShape(KVFormat(4, 128, 2), 4, torch.float16, HOPPER, overlap=True)
    try:
        with pytest.raises((EmulationError, AssertionError)):
            for _ in range(5):
                assert decode(monkeypatch, shape, [1800, 64, 640, 1, 1280], blocks=2) < 1e-3
    finally:
        ring.write_text(intact)


@pytest.mark.parametrize(("bits", "dim"), [(4, 128), (8, 64), (16, 64)])
def test_gather(emulator: Emulator, bits: int, dim: int) -> None:
    kv_format = KVFormat(bits, dim, 3)
    contexts = [70, 1, 64, 200]
    batch = random_batch(contexts, [70, 1, 5, 9], 10)
    pool = random_pool(kv_format, 10)
    q = torch.zeros(85, 3, dim, dtype=torch.float16)
    inputs = AttentionInputs(q, batch, pool, kv_format, dim**-0.5, None)
    plan = prefill_cuda._plan(batch, kv_format, min_query_len=2)
    assert [(run.first, run.rows) for run in plan.runs] == [(0, slice(0, 70)), (2, slice(71, 85))]
    for run, members in zip(plan.runs, ([0], [2, 3]), strict=True):
        found = prefill_cuda._gather(run, inputs, 1, 2)
        for row, start in zip(members, run.key_starts.tolist(), strict=False):
            pages = batch.page_table[row, : pages_of(contexts[row])].long()
            for side, wanted in enumerate(dequantize_blocks(pool[pages], kv_format)):
                tokens = wanted.transpose(1, 2).flatten(0, 1)[: contexts[row], 1:]
                rows = found[side][start : start + contexts[row]]
                torch.testing.assert_close(rows.double(), tokens, rtol=1e-3, atol=1e-3)


def prefill(
    monkeypatch: pytest.MonkeyPatch,
    kv_format: KVFormat,
    query_heads: int,
    contexts: list[int],
    queries: list[int],
    dtype: torch.dtype = torch.float16,
    window: int | None = None,
    blocks: int = 3,
    spread: float = 1.0,
) -> float:
    """The largest relative error of a row. Unused scales and outputs start as NaN; rows that are not
    the kernel's stay so."""
    monkeypatch.setattr(prefill_sm90_cuda, "multiprocessors", lambda _: blocks)
    num_pages, dim = sum(map(pages_of, contexts)) + 2, kv_format.head_dim
    batch = random_batch(contexts, queries, num_pages)
    pool = random_pool(kv_format, num_pages)
    poison(pool, kv_format, batch)
    q = (torch.randn(sum(queries), query_heads, dim) * spread).to(dtype)
    out = torch.full_like(q, math.nan)
    inputs = AttentionInputs(q, batch, pool, kv_format, dim**-0.5, window)
    served = torch.tensor(queries).repeat_interleave(torch.tensor(queries)) > 1
    assert prefill_sm90_cuda.attend(inputs, out) == served.sum()
    assert out[~served].isnan().all()
    expected = attention_in_double(q, batch, pool, kv_format, dim**-0.5, window)
    errors = (out.flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)
    return float(errors[served].max())


@pytest.mark.parametrize(
    ("bits", "dim", "query_heads", "kv_heads", "window"),
    [(4, 128, 8, 2, None), (4, 64, 3, 1, 70), (8, 128, 2, 2, 100), (8, 64, 7, 1, None)],
)
def test_prefill(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    dim: int,
    query_heads: int,
    kv_heads: int,
    window: int | None,
) -> None:
    kv_format = KVFormat(bits, dim, kv_heads)
    contexts, queries = [190, 1, 65, 130], [40, 1, 65, 2]
    limit = 1.2e-3  # of the multiplies' float16 operands
    assert prefill(monkeypatch, kv_format, query_heads, contexts, queries, window=window) < limit


def test_prefill_of_bfloat16_in_one_block(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulator, "seed", 1)
    kv_format, dtype = KVFormat(4, 128, 1), torch.bfloat16
    assert prefill(monkeypatch, kv_format, 4, [300], [70], dtype, blocks=1) < 3e-3


@pytest.mark.parametrize("window", [None, 70])
def test_prefill_of_peaked_scores(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """References of the softmax are raised in pages after the first."""
    contexts, queries = [400, 130], [100, 130]
    error = prefill(
        monkeypatch, KVFormat(4, 64, 2), 6, contexts, queries, window=window, blocks=2, spread=12.0
    )
    assert error < 5e-3
