"""Which tile a W4A8 GEMM runs with: measured winners where there are any, else a cost model.

Choosing is a few dictionary lookups and, for shapes nobody measured, arithmetic; nothing is tuned
while serving. `data/gemm_tiles.json` holds the winners: device -> weight format -> "NxK" ->
[[largest M, tile], ...].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MEASURED = Path(__file__).parent / "data" / "gemm_tiles.json"


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts a GEMM.

    kind: "large" or "small" (sm_90), "portable" (mma.sync, sm_80 and later).
    rows x tokens: the outputs of one block. cluster: blocks that share activations (large) or split
    K (small). interleave: groups of warps a block deals K out to (small, portable).
    """

    kind: str
    rows: int
    tokens: int
    cluster: int = 1
    interleave: int = 1


@dataclass(frozen=True)
class Problem:
    """tokens M, rows N, columns K of one GEMM; dequantized: its weights have level-2 scales."""

    tokens: int
    rows: int
    columns: int
    dequantized: bool


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a GPU: multiprocessors, GHz, memory bandwidth in GB/s."""

    name: str
    arch: str
    multiprocessors: int
    clock: float = 1.7
    bandwidth: float = 3500.0


LARGE_TILES = (
    Tile("large", 128, 256, 1),
    Tile("large", 128, 256, 2),
    Tile("large", 128, 128, 1),
    Tile("large", 128, 128, 2),
    Tile("large", 256, 128, 1),
)
SMALL_TILES = tuple(
    Tile("small", rows, tokens, cluster, interleave)
    for tokens in (16, 32, 64)
    for rows, cluster, interleave in (
        (128, 1, 1),
        (128, 2, 1),
        (128, 2, 2),
        (128, 4, 1),
        (64, 2, 2),
        (64, 2, 4),
        (64, 4, 2),
    )
) + tuple(Tile("small", 128, 128, cluster) for cluster in (1, 2, 4))


PORTABLE_TILES = (
    Tile("portable", 128, 128),
    Tile("portable", 128, 64),
    Tile("portable", 64, 64, interleave=2),
    Tile("portable", 64, 32, interleave=2),
    Tile("portable", 32, 32, interleave=4),
    Tile("portable", 64, 16, interleave=2),
    Tile("portable", 32, 16, interleave=4),
)


def tiles_for(arch: str) -> tuple[Tile, ...]:
    """The tiles to choose from on an architecture."""
    return SMALL_TILES + LARGE_TILES if arch == "sm_90a" else PORTABLE_TILES


@cache
def choose(problem: Problem, device: Device) -> Tile:
    """The tile of least expected time."""
    measured = _measured_tile(problem, device)
    candidates = tiles_for(device.arch)
    if measured is not None and measured in candidates:
        return measured
    return min(candidates, key=lambda tile: microseconds(tile, problem, device))


def microseconds(tile: Tile, problem: Problem, device: Device) -> float:
    """Expected time: the slower of streaming the weights and of the busiest multiprocessor."""
    streaming = problem.rows * problem.columns / 2 / device.bandwidth * 1e-3
    return max(streaming, _busiest(tile, problem, device)) + _fixed(tile)


def _busiest(tile: Tile, problem: Problem, device: Device) -> float:
    """Microseconds of the multiprocessor with the most blocks."""
    blocks = -(-problem.rows // tile.rows) * -(-problem.tokens // tile.tokens)
    steps = -(-problem.columns // 128)
    if tile.kind == "small":
        blocks, steps = blocks * tile.cluster, -(-steps // tile.cluster)
    waves: float = -(-blocks // device.multiprocessors)
    left = blocks % device.multiprocessors
    if tile.kind == "large" and tile.cluster == 2 and 0 < 2 * left <= device.multiprocessors:
        waves -= 0.5  # the last wave's tiles are split along K
    cycles = waves * (steps * _step_cycles(tile, problem) + _tile_cycles(tile))
    return cycles / device.clock * 1e-3


def _step_cycles(tile: Tile, problem: Problem) -> float:
    """Cycles of one block for 128 columns: multiplies, dequantization, and what hides neither."""
    slabs = tile.rows / 64
    multiply = tile.tokens * slabs * 2
    unpack = slabs * (130 if problem.dequantized else 70)
    if tile.kind == "large":
        return max(multiply / 0.9, unpack + 0.4 * multiply)
    if tile.kind == "portable":
        multiply *= 2  # mma.sync has half of wgmma's rate
    latency = 500 / tile.interleave
    return max(multiply + 0.5 * unpack, unpack, latency)


def _tile_cycles(tile: Tile) -> float:
    """Filling the pipeline and writing the outputs of one tile."""
    return 1500 + tile.rows * tile.tokens / 12


def _fixed(tile: Tile) -> float:
    return 3.0 + (0.5 * tile.cluster if tile.kind == "small" and tile.cluster > 1 else 0.0)


def _measured_tile(problem: Problem, device: Device) -> Tile | None:
    formats = _measurements().get(device.name, {})
    shapes = formats.get("group" if problem.dequantized else "channel", {})
    winners = shapes.get(f"{problem.rows}x{problem.columns}", [])
    return next((tile for most, tile in winners if problem.tokens <= most), None)


@cache
def _measurements() -> dict[str, dict[str, dict[str, list[tuple[int, Tile]]]]]:
    if not MEASURED.exists():
        return {}
    return {
        device: {
            weight_format: {
                shape: [(most, Tile(*tile)) for most, tile in winners]
                for shape, winners in shapes.items()
            }
            for weight_format, shapes in formats.items()
        }
        for device, formats in json.loads(MEASURED.read_text()).items()
    }
