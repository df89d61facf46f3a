"""What a launch less, and launches that overlap, are worth: linears with the producers after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from qserve.benchmark.workloads import FAMILIES, activation, cuda_copies, random_weight
from qserve.formats.activation import QuantizedActivation
from qserve.kernels import quantized_linear, rms_norm_quantize, silu_mul_quantize
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_norm_cuda import has_room, linear_rms_norm_quantize, tile_for
from qserve.testing.launches import without_overlap
from qserve.testing.timing import Call, Timing, time_interleaved

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DTYPE = torch.bfloat16
EPS = 1e-5
GROUP_SIZE = 128


@dataclass(frozen=True)
class TailRow:
    """Microseconds of a linear and the producer after it: in one launch, in two, and in two of which
    each waits for the end of the one before. `one` is None where there is no such kernel."""

    linear: str
    tokens: int
    one: Timing | None
    two: Timing
    two_waiting: Timing

    def __str__(self) -> str:
        one = "-" if self.one is None else f"{self.one.median:.2f}"
        return (
            f"{self.linear:8s} and its producer  M={self.tokens:<4d} one launch {one:>7s} us"
            f"  two {self.two.median:7.2f}  two, no overlap {self.two_waiting.median:7.2f}"
        )


def bench_tails(family: str) -> Iterator[TailRow]:
    """A row per linear that a producer follows, and batch size."""
    for linear in ("o", "gate_up", "down"):
        rows, columns = FAMILIES[family][linear]
        weights = cuda_copies(random_weight(rows, columns, GROUP_SIZE))
        for tokens in TOKENS:
            yield _time(linear, activation(tokens, columns), weights)


def _time(linear: str, x: QuantizedActivation, weights: list[CudaWeight]) -> TailRow:
    tokens, (rows, _) = len(x.codes), weights[0].shape
    with_norm = linear != "gate_up"
    gain = torch.ones(rows, dtype=DTYPE, device="cuda")
    residual = torch.randn(tokens, rows, dtype=DTYPE, device="cuda")

    def one(weight: CudaWeight) -> None:
        linear_rms_norm_quantize(x, weight, None, DTYPE, gain, EPS, residual)

    def two(weight: CudaWeight) -> None:
        product = quantized_linear(x, weight, None, DTYPE)
        if with_norm:
            rms_norm_quantize(product, gain, EPS, residual)
        else:
            silu_mul_quantize(product)

    def two_waiting(weight: CudaWeight) -> None:
        with without_overlap():
            two(weight)

    def calls(call: Callable[[CudaWeight], None]) -> list[Call]:
        return [partial(call, weight) for weight in weights]

    peers = {"two": calls(two), "two_waiting": calls(two_waiting)}
    if with_norm and has_room(tokens, weights[0], tile_for(tokens, weights[0])):
        peers["one"] = calls(one)
    times = time_interleaved(peers)
    return TailRow(linear, tokens, times.get("one"), times["two"], times["two_waiting"])
