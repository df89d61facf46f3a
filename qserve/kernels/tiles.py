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
    """tokens M, rows N, columns K of one GEMM; weight_format "channel" | "group" | "int8"."""

    tokens: int
    rows: int
    columns: int
    weight_format: str


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a GPU: multiprocessors, GHz, GB/s of a weight stream."""

    name: str
    arch: str
    multiprocessors: int
    clock: float = 1.7
    bandwidth: float = 2950.0


HOPPER_TILES = (
    Tile("small", 128, 16),
    Tile("small", 128, 16, cluster=2, interleave=2),
    Tile("small", 64, 16, cluster=2, interleave=2),
    Tile("small", 64, 16, cluster=2, interleave=4),
    Tile("small", 128, 32),
    Tile("small", 64, 32, cluster=2, interleave=2),
    Tile("small", 64, 32, cluster=2, interleave=4),
    Tile("small", 128, 64),
    Tile("small", 128, 64, cluster=2, interleave=2),
    Tile("small", 64, 64, cluster=2, interleave=2),
    Tile("small", 64, 64, cluster=2, interleave=4),
    Tile("small", 128, 128, cluster=2),
    Tile("large", 128, 128),
    Tile("large", 256, 128),
    Tile("large", 128, 256),
    Tile("large", 128, 256, cluster=2),
)
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
    return HOPPER_TILES if arch == "sm_90a" else PORTABLE_TILES


@cache
def choose(problem: Problem, device: Device) -> Tile:
    """The tile of least expected time."""
    measured = _measured_tile(problem, device)
    candidates = tiles_for(device.arch)
    if measured is not None and measured in candidates:
        return measured
    return min(candidates, key=lambda tile: microseconds(tile, problem, device))


def microseconds(tile: Tile, problem: Problem, device: Device) -> float:
    """Expected time: the slower of the weight stream and the busiest multiprocessor, and a start.

    The coefficients were fitted to an H200's times of all tiles on the layers of Llama-3-8B; there
    the tile chosen is on average 2 % slower than the best.
    """
    code_bytes = 1.0 if problem.weight_format == "int8" else 0.5
    streaming = problem.rows * problem.columns * code_bytes / device.bandwidth * 1e-3
    cycles = _large_cycles if tile.kind == "large" else _small_cycles
    busiest = cycles(tile, problem, device.multiprocessors) / device.clock * 1e-3
    return max(streaming, busiest) + (6.0 if tile.kind == "large" else 0.0)


def _large_cycles(tile: Tile, problem: Problem, multiprocessors: int) -> float:
    """Of a persistent block: whole waves of tiles, or half a one that is split along K."""
    tiles = _tiles(tile, problem)
    waves: float = -(-tiles // multiprocessors)
    left = tiles % multiprocessors
    if tile.cluster == 2 and 0 < 2 * left <= multiprocessors:
        waves -= 0.5
    multiply, unpack = _multiply_cycles(tile), _unpack_cycles(tile, problem)
    strain = 1.0 if tile.tokens == 256 else 1.07  # each weight register feeds half the multiplies
    return waves * _steps(problem) * strain * max(multiply / 0.94, unpack + 0.43 * multiply)


def _small_cycles(tile: Tile, problem: Problem, multiprocessors: int) -> float:
    """Of the blocks that share a multiprocessor: bound by its units, or by a step's latency."""
    waves = -(-_tiles(tile, problem) * tile.cluster // multiprocessors)
    multiply, unpack = _multiply_cycles(tile), _unpack_cycles(tile, problem)
    latency = (466 + 1.3 * tile.tokens) / tile.interleave / min(waves, 2)
    step = max(multiply + 0.5 * unpack, unpack, latency)
    finish = 3100 + tile.rows * tile.tokens / 3.3
    gather = 3000 if tile.cluster > 1 else 0
    return waves * (_steps(problem) / tile.cluster * step + finish) + gather


def _tiles(tile: Tile, problem: Problem) -> int:
    return -(-problem.rows // tile.rows) * -(-problem.tokens // tile.tokens)


def _steps(problem: Problem) -> int:
    return -(-problem.columns // 128)


def _multiply_cycles(tile: Tile) -> float:
    """The tensor cores' part of one step of 128 columns; mma.sync has half of wgmma's rate."""
    return tile.tokens * tile.rows / 32 * (2 if tile.kind == "portable" else 1)


def _unpack_cycles(tile: Tile, problem: Problem) -> float:
    """The integer units' part of one step."""
    per_slab = {"group": 134, "channel": 110, "int8": 60}[problem.weight_format]
    return tile.rows / 64 * per_slab


def _measured_tile(problem: Problem, device: Device) -> Tile | None:
    formats = _measurements().get(device.name, {})
    shapes = formats.get(problem.weight_format, {})
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
