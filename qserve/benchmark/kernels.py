"""Linears and producers against the hardware's ceilings and the libraries' kernels, in one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from qserve.benchmark.attention import measure_copy_bandwidth
from qserve.benchmark.tails import TailRow, bench_tails
from qserve.benchmark.workloads import (
    FAMILIES,
    activation,
    cuda_copies,
    random_int8_weight,
    random_weight,
)
from qserve.formats.activation import QuantizedActivation
from qserve.formats.weight import QuantizedWeight
from qserve.kernels import (
    quantize_per_token,
    quantized_linear,
    rms_norm_quantize,
    silu_mul_quantize,
)
from qserve.kernels.gemm import ExactFloatWeight
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.testing.timing import (
    Call,
    Timing,
    copies_beyond_cache,
    sustained,
    time_interleaved,
)

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
W4 = {
    "group": partial(random_weight, group_size=128),
    "channel": partial(random_weight, group_size=-1),
}
OURS: dict[str, Callable[[int, int], QuantizedWeight]] = {**W4, "w8a8": random_int8_weight}
"""Makes a weight [N, K] in each of our formats."""

LEAST_CHAIN = 24
"""Launches of a producer in one graph: with fewer, starting the graph counts."""

DTYPE = torch.bfloat16
Producer = Callable[[Tensor], object]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches in this run: bytes/s of a copy, operations/s of an 8192^3 FP8 product."""

    copy_bandwidth: float
    tensor_rate: float

    @classmethod
    def measure(cls) -> Ceilings:
        """Both, on random data."""
        calls = _fp8_calls(8192, 8192, 8192, 4)
        elapsed = time_interleaved({"fp8": calls})["fp8"].median * 1e-6
        return cls(measure_copy_bandwidth(), 2 * 8192**3 / elapsed)


@dataclass(frozen=True)
class GemmRow:
    """Microseconds of one linear at one batch size, by kernel, and our shares of the ceilings."""

    family: str
    linear: str
    rows: int
    columns: int
    tokens: int
    times: dict[str, Timing]
    copy_share: dict[str, float]
    tensor_share: dict[str, float]

    def __str__(self) -> str:
        times = "  ".join(f"{name} {timing.median:8.1f}" for name, timing in self.times.items())
        fp8 = self.times["fp8"].median
        ratios = " / ".join(f"{fp8 / self.times[name].median:.2f}x" for name in OURS)
        return (
            f"{self.family:13s} {self.linear:8s} M={self.tokens:<5d} {times}  FP8/ours {ratios}"
            f"  weights {self.copy_share['group']:4.0%} of copy"
            f"  {self.tensor_share['group']:4.0%} of peak"
        )


@dataclass(frozen=True)
class ProducerRow:
    """Microseconds of one producer and of a copy of as many bytes; copy_share: what it moves, as a
    share of the bandwidth that a large copy reaches."""

    op: str
    tokens: int
    columns: int
    timing: Timing
    same_copy: Timing
    copy_share: float

    def __str__(self) -> str:
        return (
            f"{self.op:20s} M={self.tokens:<5d} {self.columns:6d}  {self.timing.median:8.1f} us"
            f"  {self.copy_share:4.0%} of copy  copy of the same bytes {self.same_copy.median:8.1f} us"
        )


Row = GemmRow | ProducerRow | TailRow


def bench_kernels(
    families: Sequence[str] = tuple(FAMILIES),
    tokens: Sequence[int] = TOKENS,
    as_json: bool = False,
) -> list[Row]:
    """Check, then time, every linear of the families, with tails too, and the producers; print rows.

    Raises AssertionError if a kernel's output is not the reference's, bit for bit.
    """
    ceilings = Ceilings.measure()
    results: Iterator[Row] = chain(
        bench_gemms(families, tokens, ceilings),
        chain.from_iterable(map(bench_tails, families)),
        bench_producers(ceilings),
    )
    rows = []
    for row in results:
        rows.append(row)
        if not as_json:
            print(row, flush=True)
    if as_json:
        device = torch.cuda.get_device_name()
        print(json.dumps({"device": device, **asdict(ceilings), "rows": [asdict(r) for r in rows]}))
    else:
        _print_sums([row for row in rows if isinstance(row, GemmRow)])
    return rows


def bench_gemms(
    families: Sequence[str], tokens: Sequence[int], ceilings: Ceilings
) -> Iterator[GemmRow]:
    """A row per linear and batch size."""
    for family in families:
        for linear, (rows, columns) in FAMILIES[family].items():
            weights = {name: make(rows, columns) for name, make in OURS.items()}
            copies = {name: cuda_copies(weight) for name, weight in weights.items()}
            for count in tokens:
                x = activation(count, columns)
                for name, weight in weights.items():
                    _check(x, weight, copies[name][0])
                times = _time_linear(x, rows, copies)
                seconds = {name: times[name].median * 1e-6 for name in OURS}
                streamed = {n: copies[n][0].packed.nbytes / s for n, s in seconds.items()}
                multiplied = {n: 2 * rows * columns * count / s for n, s in seconds.items()}
                yield GemmRow(
                    family,
                    linear,
                    rows,
                    columns,
                    count,
                    times,
                    {n: rate / ceilings.copy_bandwidth for n, rate in streamed.items()},
                    {n: rate / ceilings.tensor_rate for n, rate in multiplied.items()},
                )


def bench_producers(
    ceilings: Ceilings, hidden: int = 4096, intermediate: int = 14336
) -> Iterator[ProducerRow]:
    """Every producer at decode and prefill sizes."""
    gain = torch.ones(hidden, dtype=DTYPE, device="cuda")

    def norm(x: Tensor) -> object:
        x, residual = x.view(2, -1, hidden)
        return rms_norm_quantize(x, gain, 1e-5, residual)

    ops: dict[str, tuple[Producer, int, int]] = {  # call, input columns, bytes per token
        "rms_norm_quantize": (norm, 2 * hidden, hidden * (2 + 2 + 2 + 1)),
        "silu_mul_quantize": (silu_mul_quantize, 2 * intermediate, intermediate * (2 * 2 + 1)),
        "quantize_per_token": (quantize_per_token, hidden, hidden * (2 + 1)),
    }
    for op, (call, columns, token_bytes) in ops.items():
        for tokens in (1, 64, 1024, 4096, 8192):
            nbytes = tokens * token_bytes
            times = _time_producer(call, tokens, columns, nbytes)
            share = nbytes / (times["op"].median * 1e-6) / ceilings.copy_bandwidth
            yield ProducerRow(op, tokens, columns, times["op"], times["copy"], share)


def _time_producer(call: Producer, tokens: int, columns: int, nbytes: int) -> dict[str, Timing]:
    copies = min(64, copies_beyond_cache(nbytes))
    inputs = [torch.randn(tokens, columns, dtype=DTYPE, device="cuda") for _ in range(copies)]
    sources = [torch.ones(nbytes // 8, dtype=torch.int32, device="cuda") for _ in range(copies)]
    kept: list[object] = []  # outputs of different calls must not share the cache
    peers = {
        "op": [partial(_keep, kept, call, x) for x in inputs],
        "copy": [partial(_keep, kept, lambda x: x + 1, x) for x in sources],
    }
    again = -(-LEAST_CHAIN // copies)
    return time_interleaved({name: calls * again for name, calls in peers.items()})


def _keep(kept: list[object], call: Producer, x: Tensor) -> None:
    kept.append(call(x))


def bench_sustained(
    family: str = "llama-3-8b", tokens: int = 4096, seconds: float = 0.25
) -> dict[str, dict[str, float]]:
    """The family's four linears back to back at the power cap: microseconds, clock and power.

    Peers take turns in two orders; the means are returned, and printed.
    """
    peers: dict[str, list[Call]] = {"fp8": [], **{name: [] for name in W4}}
    for rows, columns in FAMILIES[family].values():
        peers["fp8"] += _fp8_calls(tokens, rows, columns, 2)
        for name, make in W4.items():
            x = activation(tokens, columns)
            peers[name] += _our_calls(x, cuda_copies(make(rows, columns))[:2])
    result = sustained(peers, seconds)
    for name, run in result.items():
        ratio = result["fp8"]["microseconds"] / run["microseconds"]
        print(
            f"{name:8s} {run['microseconds'] / 2:9.1f} us  {ratio:.2f}x"
            f"  {run['megahertz']:.0f} MHz  {run['watts']:.0f} W"
        )
    return result


def _check(x: QuantizedActivation, weight: QuantizedWeight, prepared: CudaWeight) -> None:
    """Compare with the reference's exact sums, which float32 on the GPU carries out exactly too."""
    expected = ExactFloatWeight.prepare(weight).apply(x, None, DTYPE)
    assert torch.equal(quantized_linear(x, prepared, None, DTYPE), expected), (
        f"{weight.shape} at {len(x.codes)} tokens differs from the reference"
    )


def _time_linear(
    x: QuantizedActivation, rows: int, weights: dict[str, list[CudaWeight]]
) -> dict[str, Timing]:
    tokens, columns = x.codes.shape
    copies = 4 if tokens >= 256 else None
    peers = {name: _our_calls(x, own[:copies]) for name, own in weights.items()}
    peers["fp8"] = _fp8_calls(tokens, rows, columns, copies)
    peers["int8"] = _int8_calls(x.codes, rows, copies)
    peers["bf16"] = _bf16_calls(tokens, rows, columns, copies)
    return time_interleaved(peers)


def _our_calls(x: QuantizedActivation, weights: Sequence[CudaWeight]) -> list[Call]:
    return [partial(quantized_linear, x, weight, None, DTYPE) for weight in weights]


def _fp8_calls(tokens: int, rows: int, columns: int, copies: int | None) -> list[Call]:
    """cuBLAS with a scale per row of both operands; it takes at least 16 tokens."""
    x = torch.randn(max(tokens, 16), columns, device="cuda").to(torch.float8_e4m3fn)
    x_scale, scale = torch.ones(len(x), 1, device="cuda"), torch.ones(1, rows, device="cuda")
    weights = _clones(torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn), copies)
    multiply = partial(torch._scaled_mm, x, out_dtype=DTYPE, use_fast_accum=True)
    return [partial(multiply, w.t(), scale_a=x_scale, scale_b=scale) for w in weights]


def _int8_calls(codes: Tensor, rows: int, copies: int | None) -> list[Call]:
    """cuBLAS to int32 without an epilogue; it takes at least 17 tokens, a multiple of 8."""
    padded = torch.zeros(max(len(codes), 32), codes.shape[1], dtype=torch.int8, device="cuda")
    padded[: len(codes)] = codes
    weight = torch.randint(-127, 128, (rows, codes.shape[1]), dtype=torch.int8, device="cuda")
    return [partial(torch._int_mm, padded, w.t()) for w in _clones(weight, copies)]


def _bf16_calls(tokens: int, rows: int, columns: int, copies: int | None) -> list[Call]:
    x = torch.randn(tokens, columns, dtype=DTYPE, device="cuda")
    weight = torch.randn(rows, columns, dtype=DTYPE, device="cuda")
    return [partial(torch.nn.functional.linear, x, w) for w in _clones(weight, copies)]


def _clones(weight: Tensor, copies: int | None) -> list[Tensor]:
    count = copies_beyond_cache(weight.nbytes) if copies is None else copies
    return [weight] + [weight.clone() for _ in range(count - 1)]


def _print_sums(rows: Sequence[GemmRow]) -> None:
    """The four linears of a layer together."""
    for family in dict.fromkeys(row.family for row in rows):
        for tokens in dict.fromkeys(row.tokens for row in rows):
            layer = [row for row in rows if (row.family, row.tokens) == (family, tokens)]
            total = {n: sum(row.times[n].median for row in layer) for n in layer[0].times}
            times = "  ".join(f"{name} {value:8.1f}" for name, value in total.items())
            ratios = " / ".join(f"{total['fp8'] / total[name]:.2f}x" for name in OURS)
            print(f"{family:13s} layer M={tokens:<5d} {times}  FP8/ours {ratios}", flush=True)
