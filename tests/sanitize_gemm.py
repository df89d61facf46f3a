r"""A few small calls of one kernel path, to be run under NVIDIA's checker on a machine with a GPU:

    compute-sanitizer --tool racecheck --error-exitcode 1 --kernel-name kns=w4a8 \
        python tests/sanitize_gemm.py large|small|portable|large_norm|small_norm|producers

`--kernel-name kns=quantize` for the producers; memcheck takes `--report-api-errors no`, since CUDA's
Python bindings ask the driver for functions that it lacks. racecheck does not see that `__syncwarp`
orders the lanes of a warp before one of them arrives at a barrier for all, so here each arrives. It must
be given a name that all kernels of clusters have which run: those that it leaves out end with an illegal
address (compute-sanitizer 2025.3.1), which is its own fault, as they run well without it, under memcheck,
and when it checks them, too.

Exits with an error if a result is not what it is on a CPU or, of a GEMM that goes on with a norm, by two
launches; and by `--error-exitcode 1` if the checker finds something.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product

import torch
from norm_helpers import assert_ready, assert_same

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.grid import fit_grid
from qserve.formats.weight import QuantizedWeight, W8Weight
from qserve.kernels.fused import quantize_per_token, rms_norm_quantize, silu_mul_quantize
from qserve.kernels.gemm import reference_linear
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_norm_cuda import NORM_TILES, linear_rms_norm_quantize
from qserve.kernels.tiles import tiles_for
from qserve.testing.launches import every_lane_arriving

SHAPE = (320, 1088)


def make_weight(bits: int, group_size: int) -> QuantizedWeight:
    weight = torch.randn(SHAPE)
    if bits == 8:
        return W8Weight.quantize(weight)
    grid = fit_grid(weight, group_size)
    return grid.pack(grid.quantize(weight))


def run_gemms(kind: str) -> None:
    """Every tile of a kind, group and 8-bit weights, at two batch sizes."""
    tiles = [t for t in tiles_for("sm_90a") + tiles_for("sm_80") if t.kind == kind]
    for bits, group_size in ((4, 64), (4, -1), (8, -1)):
        weight = make_weight(bits, group_size)
        prepared = CudaWeight.prepare(weight, torch.device("cuda"))
        for tile, tokens in product(tiles, (5, 270)):
            x = quantize_activation(torch.randn(tokens, SHAPE[1]))
            on_gpu = QuantizedActivation(*(tensor.cuda() for tensor in vars(x).values()))
            out = prepared.apply_tile(on_gpu, None, torch.float16, tile)
            assert torch.equal(out.cpu(), reference_linear(x, weight, None, torch.float16)), tile


def run_norms(kind: str) -> None:
    """Every tile of a kind that goes on with one, at two batch sizes; "large" blocks have several tiles."""
    weight = CudaWeight.prepare(make_weight(4, -1), torch.device("cuda"))
    if kind == "large":
        weight = replace(weight, device=replace(weight.device, multiprocessors=3))
    tiles = [
        t for t in tiles_for("sm_90a") if t.kind == kind and (kind == "small" or t in NORM_TILES)
    ]
    rows, columns = SHAPE
    gain = torch.rand(rows).half().cuda()
    for tile, tokens in product(tiles, (5, 70 if kind == "small" else 600)):
        x = quantize_activation(torch.randn(tokens, columns, device="cuda"))
        residual = torch.randn(tokens, rows, device="cuda").half()
        out = weight.apply_tile(x, None, torch.float16, tile)
        expected, expected_total = rms_norm_quantize(out, gain, 1e-5, residual)
        found, total = linear_rms_norm_quantize(
            x, weight, None, torch.float16, gain, 1e-5, residual, tile
        )
        assert torch.equal(total, expected_total), tile
        assert_same(found, expected)
        assert_ready(weight)


def run_producers() -> None:
    """Each producer at an odd and a long row."""
    for tokens, columns in ((3, 576), (5, 14336)):
        x, gate_up = torch.randn(tokens, columns).half(), torch.randn(tokens, 2 * columns).half()
        gain = torch.rand(columns).half()
        found, _ = rms_norm_quantize(x.cuda(), gain.cuda(), 1e-5, x.cuda().clone())
        assert_within_a_code(found, rms_norm_quantize(x, gain, 1e-5, x.clone())[0])
        assert_within_a_code(quantize_per_token(x.cuda()), quantize_per_token(x))
        assert_within_a_code(silu_mul_quantize(gate_up.cuda()), silu_mul_quantize(gate_up))


def assert_within_a_code(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    assert (found.codes.cpu().int() - expected.codes.int()).abs().max() <= 1
    torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=2e-6, atol=0)
    assert torch.equal(found.row_sum, found.codes.sum(dim=1, dtype=torch.int32))


if __name__ == "__main__":
    path = sys.argv[1]
    kind, _, tail = path.partition("_")
    with every_lane_arriving():
        if path == "producers":
            run_producers()
        else:
            (run_norms if tail == "norm" else run_gemms)(kind)
    print(f"{path}: done")
