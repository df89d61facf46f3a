"""Attention over pages and the append kernel against the memory's ceiling and torch's attention."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, chain, product

import torch
from torch import Tensor
from torch.nn import functional

from qserve.formats.kv import KVFormat
from qserve.kernels import paged_attention, paged_attention_quantize, rope_append
from qserve.testing.paging import pages_of, random_batch, random_pool
from qserve.testing.timing import Call, copies_beyond_cache, time_interleaved

DTYPE = torch.float16
MAX_COPIES = 24
APPEND_TOKENS = (1, 64, 256, 1024, 8192, 32768)
PROMPTS = {
    "1 x 1024": ((1024,), (1024,)),
    "8 x 1024": ((1024,) * 8, (1024,) * 8),
    "1 x 32768": ((32768,), (32768,)),
    "512 behind 8192": ((8704,), (512,)),
}
"""Contexts and queries of prefill steps."""


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
    """Microseconds of a decode step: ours, ours as int8, torch's over a float16 cache; the share of
    the copy bandwidth at which codes and scales are read."""

    case: AttentionCase
    microseconds: float
    quantized: float
    torch_flash: float | None
    share: float

    def __str__(self) -> str:
        kv_format = self.case.kv_format
        peer = "-" if self.torch_flash is None else f"{self.torch_flash:.1f}"
        return (
            f"{self.case.name:16s} KV{kv_format.bits} {self.case.num_query_heads}/"
            f"{kv_format.num_kv_heads} D{kv_format.head_dim}  {self.case.nbytes / 1e6:7.1f} MB  "
            f"{self.microseconds:7.1f} us  {self.share:6.1%} of copy  "
            f"int8 {self.quantized:7.1f} us  torch {peer:>8s} us"
        )


@dataclass(frozen=True)
class AppendRow:
    """Microseconds of one append, and its share of the copy bandwidth."""

    tokens: int
    hadamard: bool
    microseconds: float
    share: float

    def __str__(self) -> str:
        name = "append, Hadamard" if self.hadamard else "append"
        return f"{name:16s} {self.tokens:6d} tokens  {self.microseconds:8.2f} us  {self.share:6.1%} of copy"


@dataclass(frozen=True)
class PrefillRow:
    """Microseconds of attention over pages, and of flash attention over float16 tensors."""

    name: str
    microseconds: float
    torch_flash: float

    def __str__(self) -> str:
        return (
            f"prefill {self.name:16s} {self.microseconds:9.1f} us  torch {self.torch_flash:9.1f} us"
        )


Row = AttentionRow | AppendRow | PrefillRow


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
    """Time one case over pools that rotate as a model's layers do: no page is in the L2 cache."""
    peers: dict[str, Sequence[Call]] = _our_calls(case)
    if with_torch:
        peers["torch"] = _torch_calls(case)
    times = time_interleaved(peers)
    ours, theirs = times["ours"].median, times["torch"].median if with_torch else None
    share = case.nbytes / (ours * 1e-6) / copy_bandwidth
    return AttentionRow(case, ours, times["quantized"].median, theirs, share)


def bench_append(tokens: int, hadamard: bool, copy_bandwidth: float) -> AppendRow:
    """RoPE, quantize and write for `tokens` tokens of 32 + 2 x 8 heads of 128. Fewer than 1024 tokens
    are decode steps, more are one prompt."""
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
    options = (table, batch, pool, kv_format, query_heads, hadamard)
    calls = [partial(rope_append, copy, *options) for copy in copies]
    elapsed = time_interleaved({"append": calls})["append"].median
    return AppendRow(tokens, hadamard, elapsed, nbytes / (elapsed * 1e-6) / copy_bandwidth)


def bench_prefill(name: str) -> PrefillRow:
    """A step of `PROMPTS`, 32 query and 8 KV heads of 128, 4-bit pages."""
    contexts, queries = PROMPTS[name]
    kv_format, num_pages = KVFormat(4, 128, 8), sum(map(pages_of, contexts))
    batch = random_batch(contexts, queries, num_pages, "cuda")
    pool = random_pool(kv_format, num_pages, "cuda")
    q = torch.randn(sum(queries), 32, 128, dtype=DTYPE, device="cuda")
    keys, values = torch.randn(2, sum(contexts), 8, 128, dtype=DTYPE, device="cuda")
    ours = partial(paged_attention, q, batch, pool, kv_format, 128**-0.5)
    theirs = _varlen_call(q, keys, values, contexts, queries)
    peers: dict[str, Sequence[Call]] = {"ours": [ours] * 2, "torch": [theirs] * 2}
    times = time_interleaved(peers)
    return PrefillRow(name, times["ours"].median, times["torch"].median)


def bench_paged(as_json: bool = False) -> None:
    """Print every case at head dims 128 and 64 and with 8-bit pages, append and prefill."""
    bandwidth = measure_copy_bandwidth()
    rows = []
    if not as_json:
        print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    for row in _all_rows(bandwidth):
        rows.append(row)
        if not as_json:
            print(row, flush=True)
        torch.cuda.empty_cache()
    if as_json:
        device = torch.cuda.get_device_name()
        result = {"device": device, "copy_bandwidth": bandwidth, "rows": [asdict(r) for r in rows]}
        print(json.dumps(result, default=str))


def _all_rows(bandwidth: float) -> Iterator[Row]:
    for case in chain(attention_cases(), attention_cases(head_dim=64), attention_cases(bits=8)):
        yield bench_attention(case, bandwidth, with_torch=case.kv_format.bits == 4)
    for tokens, hadamard in product(APPEND_TOKENS, (True, False)):
        yield bench_append(tokens, hadamard, bandwidth)
    yield from map(bench_prefill, PROMPTS)


def measure_copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes read and written per second by torch's elementwise kernel, the best of several runs."""
    source = torch.ones(nbytes // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": [lambda: torch.add(source, 1, out=target)] * 4})["copy"]
    return 2 * nbytes / (timing.median * 1e-6)


def _our_calls(case: AttentionCase) -> dict[str, Sequence[Call]]:
    kv_format, scale = case.kv_format, case.kv_format.head_dim**-0.5
    used = sum(map(pages_of, case.contexts))
    copies = min(MAX_COPIES, copies_beyond_cache(case.nbytes))
    pools = random_pool(kv_format, used * copies, "cuda").split(used)
    batch = random_batch(case.contexts, [1] * len(case.contexts), used, "cuda")
    q = _queries(case)
    paged_attention(q, batch, pools[0], kv_format, scale)  # makes the step's work list
    ops = {"ours": paged_attention, "quantized": paged_attention_quantize}
    return {
        name: [partial(op, q, batch, pool, kv_format, scale) for pool in pools]
        for name, op in ops.items()
    }


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
        once = (1,) * len(case.contexts)
        return [_varlen_call(q, keys, values, case.contexts, once) for keys, values in caches]
    return [_dense_call(q, keys, values, len(case.contexts)) for keys, values in caches]


def _dense_call(q: Tensor, keys: Tensor, values: Tensor, sequences: int) -> Call:
    keys, values = (x.reshape(sequences, x.shape[1], -1, x.shape[2]) for x in (keys, values))
    return lambda: functional.scaled_dot_product_attention(
        q[:, :, None], keys, values, enable_gqa=keys.shape[1] != q.shape[1]
    )


def _varlen_call(
    q: Tensor, keys: Tensor, values: Tensor, contexts: tuple[int, ...], queries: tuple[int, ...]
) -> Call:
    """Causal, the queries being each sequence's last positions."""
    query_starts, key_starts = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
        for lengths in (queries, contexts)
    )
    starts, longest = (query_starts, key_starts), (max(queries), max(contexts))
    return lambda: torch.ops.aten._flash_attention_forward(
        q, keys, values, *starts, *longest, 0.0, True, False
    )
