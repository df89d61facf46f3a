"""The variants of the W4A8 kernels: which source, constants and shared memory a tile takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from qserve.kernels.jit import Kernel
from qserve.kernels.tiles import Tile
from qserve.kernels.wgmma import wgmma_source

BLOCK = 128
"""Rows and columns of a packed block; smaller remainders are padded with zeros."""

SLAB_ROWS = 64
REGISTERS = 65536
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory one block may have on Hopper; half of it lets two run side by side."""

PORTABLE_SHARED_LIMIT = 99 * 1024
"""... on every GPU from sm_80 on."""

OPERANDS = "(6P5i)"
"""`Operands` of csrc/epilogue.cuh."""


@dataclass(frozen=True)
class Policy:
    """How packed codes become what the tensor cores multiply.

    group_size: 64 | 128, or -1 for per-channel codes, whose zero points the epilogue takes off, in
    float64 where they are fractional.
    """

    group_size: int
    fractional_zeros: bool = False

    @property
    def per_channel(self) -> bool:
        """Whether codes are multiplied as they are."""
        return self.group_size == -1

    @property
    def slab_bytes(self) -> int:
        """Bytes of 64 rows x 128 columns with their level-2 scales."""
        groups = 0 if self.per_channel else BLOCK // self.group_size
        return SLAB_ROWS * BLOCK // 2 + groups * SLAB_ROWS * 2


@dataclass(frozen=True)
class _Design:
    """What one kernel makes of a tile.

    weight_offset: what is added to dequantized weights, 0 or 128.
    """

    parameters: str
    threads: int
    stages: int
    shared_bytes: int
    weight_offset: int = 128
    blocks_per_multiprocessor: int = 1


@cache
def gemm_kernel(tile: Tile, policy: Policy, bfloat16: bool) -> Kernel:
    """The variant for a tile, a weight format and an output type."""
    design = _DESIGNS[tile.kind](tile, policy)
    offset = 0 if policy.per_channel else design.weight_offset
    on_hopper = tile.kind != "portable"
    return Kernel(
        f"w4a8_gemm_{tile.kind}{'_sm90' if on_hopper else ''}.cu",
        f"w4a8_gemm_{tile.kind}",
        parameters=design.parameters,
        threads=design.threads,
        shared_bytes=design.shared_bytes,
        cluster=tile.cluster,
        overlap=on_hopper,
        generated=wgmma_source(tile.tokens, "u8" if offset else "s8") if on_hopper else "",
        constants={
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "CLUSTER": tile.cluster,
            "INTERLEAVE": tile.interleave,
            "STAGES": design.stages,
            "SHARED_BYTES": design.shared_bytes,
            "BLOCKS_PER_MULTIPROCESSOR": design.blocks_per_multiprocessor,
            "PER_CHANNEL": policy.per_channel,
            "GROUP_SIZE": BLOCK if policy.per_channel else policy.group_size,
            "WEIGHT_OFFSET": offset,
            "FRACTIONAL_ZEROS": policy.fractional_zeros,
            "OUTPUT_BFLOAT16": bfloat16,
        },
    )


def _large(tile: Tile, policy: Policy) -> _Design:
    staging = 2 * 3 * 64 * SLAB_ROWS * 2
    fixed = 1024 + staging + 2 * tile.tokens * 8
    stage = _stage_bytes(tile, policy) + 16
    stages = (SHARED_LIMIT - fixed) // stage
    # Unsigned weights save an instruction, signed ones power, which the largest tiles run out of.
    offset = 0 if tile.tokens == 256 else 128
    parameters = f"128s128s{OPERANDS}i"
    return _Design(parameters, 384, stages, fixed + stages * stage, weight_offset=offset)


def _small(tile: Tile, policy: Policy) -> _Design:
    threads = tile.rows // SLAB_ROWS * tile.interleave * 128 + 64
    blocks = 2 if REGISTERS // (2 * threads) >= 66 + tile.tokens // 2 else 1
    stage = _stage_bytes(tile, policy) + 16
    fit = (SHARED_LIMIT // blocks - 2048) // stage // tile.interleave
    stages = min(16, fit * tile.interleave)
    shared = 1024 + max(stages * stage, _sum_bytes(tile) + 16 * stages)
    return _Design(f"128s{OPERANDS}P", threads, stages, shared, blocks_per_multiprocessor=blocks)


def _portable(tile: Tile, policy: Policy) -> _Design:
    stage = tile.interleave * _stage_bytes(tile, policy)
    stages = min(4, PORTABLE_SHARED_LIMIT // stage)
    shared = max(stages * stage, _sum_bytes(tile))
    return _Design(f"P{OPERANDS}P", tile.rows * tile.interleave, stages, shared)


def _stage_bytes(tile: Tile, policy: Policy) -> int:
    """Both operands' 128 columns."""
    return tile.tokens * BLOCK + tile.rows * policy.slab_bytes // SLAB_ROWS


def _sum_bytes(tile: Tile) -> int:
    """Partial sums of every part of K, in padded rows."""
    return tile.interleave * tile.tokens * (tile.rows + 4) * 4


_DESIGNS: dict[str, Callable[[Tile, Policy], _Design]] = {
    "large": _large,
    "small": _small,
    "portable": _portable,
}
