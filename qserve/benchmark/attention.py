"""Decode attention against the memory's ceiling and torch's own attention, and the append kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product

import torch
from torch import Tensor
from torch.nn import functional

from qserve.formats.kv import KVFormat
from qserve.kernels import PagedBatch, paged_attention, rope_append
from qserve.testing.paging import pages_of, random_batch, random_pool
from qserve.testing.timing import Call, copies_beyond_cache, time_interleaved

DTYPE = torch.float16
MAX_COPIES = 24
APPEND_TOKENS = (1, 64, 256, 1024, 8192, 32768)


@dataclass(frozen=True)
class AttentionCase:
    """One decode step: a query for each of these contexts."""

    name: str
    contexts: tuple[int, ...]
    num_query_heads: int
    kv_format: KVFormat

    @property
    def nbytes(self) -> int:
        """Codes and scales that the step must read."""
        return sum(self.contexts) * self.kv_format.bytes_per_token


@dataclass(frozen=True)
class AttentionRow:
    """Microseconds of a case: ours, torch's over a float16 cache; share of the copy bandwidth."""

    case: AttentionCase
    microseconds: float
    torch_microseconds: float | None
    copy_bandwidth: float

    @property
    def share(self) -> float:
        return self.case.nbytes / (self.microseconds * 1e-6) / self.copy_bandwidth

    def __str__(self) -> str:
        kv_format = self.case.kv_format
        peer = "-" if self.torch_microseconds is None else f"{self.torch_microseconds:8.1f}"
        return (
            f"{self.case.name:24s} KV{kv_format.bits} {self.case.num_query_heads}/"
            f"{kv_format.num_kv_heads} D{kv_format.head_dim}  {self.case.nbytes / 1e6:7.1f} MB  "
            f"{self.microseconds:8.1f} us  {self.share:6.1%} of copy  torch {peer} us"
        )


def attention_cases(
    heads: Sequence[tuple[int, int]] = ((32, 8), (32, 32)), head_dim: int = 128, bits: int = 4
) -> Iterator[AttentionCase]:
    """Long, short, single and ragged batches."""
    ragged = torch.randint(128, 2305, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    contexts = {
        "256 x 1280": (1280,) * 256,
        "64 x 8192": (8192,) * 64,
        "256 x 128..2304": tuple(ragged),
        "1 x 32768": (32768,),
    }
    for query_heads, kv_heads in heads:
        for name, lengths in contexts.items():
            yield AttentionCase(name, lengths, query_heads, KVFormat(bits, head_dim, kv_heads))


def bench_attention(
    case: AttentionCase, copy_bandwidth: float, with_torch: bool = True
) -> AttentionRow:
    """Time one case over page tables that rotate, so that no page is in the L2 cache."""
    peers: dict[str, Sequence[Call]] = {"ours": _our_calls(case)}
    if with_torch:
        peers["torch"] = _torch_calls(case)
    times = time_interleaved(peers)
    theirs = times["torch"].median if with_torch else None
    return AttentionRow(case, times["ours"].median, theirs, copy_bandwidth)


def bench_append(tokens: int, hadamard: bool = True) -> tuple[float, int]:
    """Microseconds of RoPE, quantize and write for `tokens` tokens of 32 + 2 x 8 heads of 128, and
    the bytes that moves. Fewer than 1024 tokens are decode steps, more are one prompt."""
    kv_format, query_heads = KVFormat(4, 128, 8), 32
    qkv = torch.randn(tokens, (query_heads + 16) * 128, dtype=DTYPE, device="cuda")
    nbytes = qkv.nbytes + tokens * (query_heads * 128 * 2 + kv_format.bytes_per_token)
    decode = tokens < 1024
    contexts, queries = ([1280] * tokens, [1] * tokens) if decode else ([tokens], [tokens])
    num_pages = sum(map(pages_of, contexts))
    batch = random_batch(contexts, queries, num_pages, "cuda")
    pool = kv_format.new_pool(num_pages, "cuda")
    table = torch.rand(max(contexts), 128, device="cuda")
    copies = [qkv.clone() for _ in range(min(MAX_COPIES, copies_beyond_cache(nbytes)))]
    calls = [
        lambda x=x: rope_append(x, table, batch, pool, kv_format, query_heads, hadamard)
        for x in copies
    ]
    return time_interleaved({"append": calls})["append"].median, nbytes


def bench_paged() -> None:
    """Print every case at head dims 128 and 64 and with 8-bit pages, then the append kernel."""
    bandwidth = measure_copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    for case in (*attention_cases(), *attention_cases(head_dim=64), *attention_cases(bits=8)):
        print(bench_attention(case, bandwidth, with_torch=case.kv_format.bits == 4), flush=True)
        torch.cuda.empty_cache()
    for tokens, hadamard in product(APPEND_TOKENS, (True, False)):
        elapsed, nbytes = bench_append(tokens, hadamard)
        share = nbytes / (elapsed * 1e-6) / bandwidth
        name = "append + Hadamard" if hadamard else "append"
        print(f"{name:18s} {tokens:6d} tokens  {elapsed:8.2f} us  {share:6.1%} of copy")


def measure_copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes read and written per second by torch's elementwise kernel, the best of several runs."""
    source = torch.ones(nbytes // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": [lambda: torch.add(source, 1, out=target)] * 4})["copy"]
    return 2 * nbytes / (timing.median * 1e-6)


def _our_calls(case: AttentionCase) -> list[Call]:
    kv_format, scale = case.kv_format, case.kv_format.head_dim**-0.5
    used = sum(map(pages_of, case.contexts))
    copies = min(MAX_COPIES, copies_beyond_cache(case.nbytes))
    pool = random_pool(kv_format, used * copies, "cuda")
    first = random_batch(case.contexts, [1] * len(case.contexts), used, "cuda")
    q = _queries(case)

    def call(batch: PagedBatch) -> Callable[[], Tensor]:
        return lambda: paged_attention(q, batch, pool, kv_format, scale)

    return [
        call(replace(first, page_table=first.page_table + used * copy, derived=first.derived))
        for copy in range(copies)
    ]


def _queries(case: AttentionCase) -> Tensor:
    shape = (len(case.contexts), case.num_query_heads, case.kv_format.head_dim)
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def _torch_calls(case: AttentionCase) -> list[Call]:
    """Over a float16 cache without pages: SDPA, or varlen flash attention where lengths differ."""
    kv_format = case.kv_format
    q, total = _queries(case), sum(case.contexts)
    shape = (total, kv_format.num_kv_heads, kv_format.head_dim)
    copies = min(4, copies_beyond_cache(total * shape[1] * shape[2] * 4, least=2))
    caches = [
        tuple(torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2))
        for _ in range(copies)
    ]
    if len(set(case.contexts)) > 1:
        return [_varlen_call(q, keys, values, case.contexts) for keys, values in caches]
    return [_dense_call(q, keys, values, len(case.contexts)) for keys, values in caches]


def _dense_call(q: Tensor, keys: Tensor, values: Tensor, sequences: int) -> Call:
    keys, values = (x.reshape(sequences, x.shape[1], -1, x.shape[2]) for x in (keys, values))
    return lambda: functional.scaled_dot_product_attention(
        q[:, :, None], keys, values, enable_gqa=keys.shape[1] != q.shape[1]
    )


def _varlen_call(q: Tensor, keys: Tensor, values: Tensor, contexts: tuple[int, ...]) -> Call:
    starts = torch.tensor([0, *accumulate(contexts)], dtype=torch.int32, device="cuda")
    queries = torch.arange(len(contexts) + 1, dtype=torch.int32, device="cuda")
    return lambda: torch.ops.aten._flash_attention_forward(
        q, keys, values, queries, starts, 1, max(contexts), 0.0, False, False
    )
