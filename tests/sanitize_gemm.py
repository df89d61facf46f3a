r"""A few small calls of one kernel path, to be run under NVIDIA's checker on a machine with a GPU:

    compute-sanitizer --tool racecheck --kernel-name kns=w4a8 \
        python tests/sanitize_gemm.py large|small|portable|norm|producers

`--kernel-name kns=quantize` for the producers; memcheck takes `--report-api-errors no`, since CUDA's
Python bindings ask the driver for functions that it lacks. racecheck does not see that `__syncwarp`
orders the lanes of a warp before one of them arrives at a barrier for all, so here each arrives.

Exits with an error if a result is not the reference's, or if the checker finds something.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from qserve.formats.activation import QuantizedActivation, quantize_activation
from qserve.formats.grid import fit_grid
from qserve.formats.weight import QuantizedWeight, W8Weight
from qserve.kernels.fused import quantize_per_token, rms_norm_quantize, silu_mul_quantize
from qserve.kernels.gemm import reference_linear
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_norm_cuda import linear_rms_norm_quantize
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


def run_norms() -> None:
    """Every tile of the Hopper kernels, at two batch sizes."""
    weight = CudaWeight.prepare(make_weight(4, -1), torch.device("cuda"))
    rows, columns = SHAPE
    gain = torch.ones(rows, dtype=torch.float16, device="cuda")
    for tile, many in product(tiles_for("sm_90a"), (False, True)):
        tokens = 5 if not many else 270 if tile.kind == "large" else 70
        x = quantize_activation(torch.randn(tokens, columns, device="cuda"))
        residual = torch.randn(tokens, rows, device="cuda").half()
        linear_rms_norm_quantize(x, weight, None, torch.float16, gain, 1e-5, residual, tile)
    torch.cuda.synchronize()


def run_producers() -> None:
    """Each producer at an odd and a long row."""
    for tokens, columns in ((3, 576), (5, 14336)):
        x = torch.randn(tokens, columns, dtype=torch.float16).cuda()
        gain = torch.ones(columns).half().cuda()
        rms_norm_quantize(x, gain, 1e-5, x.clone())
        quantize_per_token(x)
        silu_mul_quantize(torch.randn(tokens, 2 * columns).half().cuda())
    torch.cuda.synchronize()


if __name__ == "__main__":
    path = sys.argv[1]
    runs = {"producers": run_producers, "norm": run_norms}
    with every_lane_arriving():
        runs.get(path, lambda: run_gemms(path))()
    print(f"{path}: done")
