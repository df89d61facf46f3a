"""Measure every sensible tile on the layers of the model families and write the winners.

    python benchmarks/tune_tiles.py OUT.json [--families llama-3-8b ...]

OUT.json is what `qserve/kernels/data/gemm_tiles.json` holds for one device; times of all candidates
go to OUT.json's neighbour `.times.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qserve.benchmark.workloads import FAMILIES, activation, cuda_copies, random_weight
from qserve.kernels.gemm_cuda import CudaWeight
from qserve.kernels.gemm_variants import gemm_kernel
from qserve.kernels.jit import warm_up
from qserve.kernels.tiles import Problem, Tile, microseconds, tiles_for
from qserve.testing.timing import time_interleaved

MOST_COPIES = 128
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def candidates(problem: Problem, weight: CudaWeight) -> list[Tile]:
    """Tiles not hopelessly slower than the model's favourite."""
    scored = [(microseconds(t, problem, weight.device), t) for t in tiles_for(weight.device.arch)]
    best = min(score for score, _ in scored)
    return [tile for score, tile in sorted(scored, key=lambda s: s[0]) if score < 1.5 * best][:8]


def measure(weights: list[CudaWeight], tokens: int) -> dict[Tile, float]:
    """Microseconds of each candidate."""
    rows, columns = weights[0].shape
    x = activation(tokens, columns)
    used = weights[:MOST_COPIES] if tokens < 256 else weights[:4]
    problem = Problem(tokens, rows, columns, weights[0].policy.name)
    peers = {
        tile: [lambda w=w, t=tile: w.apply_tile(x, None, torch.float16, t) for w in used]
        for tile in candidates(problem, weights[0])
    }
    warm_up([gemm_kernel(tile, weights[0].policy, False, False) for tile in peers], x.codes.device)
    timings = time_interleaved(peers, rounds=5)
    return {tile: timing.median for tile, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    arguments = parser.parse_args()
    shapes = sorted({s for family in arguments.families for s in FAMILIES[family].values()})
    winners: dict[str, dict[str, list[object]]] = {"group": {}, "channel": {}}
    times: dict[str, list[object]] = {}
    for rows, columns in shapes:
        for weight_format, group_size in (("group", 128), ("channel", -1)):
            weights = cuda_copies(random_weight(rows, columns, group_size))
            chosen: list[object] = []
            for tokens in TOKENS:
                measured = measure(weights, tokens)
                best = min(measured, key=measured.__getitem__)
                chosen.append([tokens, list(vars(best).values())])
                key = f"{weight_format} {rows}x{columns} M={tokens}"
                times[key] = [[round(t, 2), *vars(tile).values()] for tile, t in measured.items()]
                print(
                    f"{key:32s} {measured[best]:8.1f} us  {list(vars(best).values())}", flush=True
                )
            winners[weight_format][f"{rows}x{columns}"] = chosen
    device = torch.cuda.get_device_name()
    arguments.out.write_text(json.dumps({device: winners}))
    arguments.out.with_suffix(".times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    main()
