"""The variants of the W4A8 kernels: which source, constants and shared memory a tile takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from qserve.kernels.jit import Kernel
from qserve.kernels.producers_cuda import norm_weight_source, row_constants
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

NORM_BYTES = 32
"""Of static shared memory that csrc/tail_large.cuh takes for a token."""

INBOX_PARTS = 512 * 1024
"""That blocks of a "large" kernel can tell each other of their tokens' rows."""

OPERANDS = "(6P5i)"
"""`Operands` of csrc/epilogue.cuh."""


@dataclass(frozen=True)
class Policy:
    """How packed weights become what the tensor cores multiply.

    bits: 4 | 8. group_size: 64 | 128 for two-level 4-bit weights, else -1. fractional_zeros: the zero
    points of per-channel 4-bit codes are not all integers, so the epilogue takes them off in float64.
    """

    bits: int = 4
    group_size: int = -1
    fractional_zeros: bool = False

    @property
    def name(self) -> str:
        """The weight format as the tile tables call it."""
        if self.bits == 8:
            return "int8"
        return "channel" if self.group_size == -1 else "group"

    @property
    def has_zeros(self) -> bool:
        """Whether codes are multiplied as they are, and zero points left to the epilogue."""
        return self.bits == 4 and self.group_size == -1

    @property
    def groups(self) -> int:
        """Level-2 scales per row and block."""
        return 0 if self.group_size == -1 else BLOCK // self.group_size

    @property
    def slab_bytes(self) -> int:
        """Bytes of 64 rows x 128 columns with their level-2 scales."""
        return SLAB_ROWS * (BLOCK * self.bits // 8 + 2 * self.groups)


@dataclass(frozen=True)
class Norm:
    """RMSNorm and quantization of the outputs, by a "small" or "large" kernel itself.

    float_weight: as of `producer_kernel`. token_tiles: of which all blocks together make all outputs at
    once, for a "large" kernel.
    """

    columns: int
    float_weight: bool
    token_tiles: int = 1

    def added_to(self, kernel: Kernel, tile: Tile) -> Kernel:
        """The variant that goes on with this."""
        is_small = tile.kind == "small"
        grouping = {"TILE_GROUP": self.token_tiles, "INBOX_PARTS": INBOX_PARTS}
        return replace(
            kernel,
            source=kernel.source.replace("_sm90", "_norm_sm90"),
            entry=f"{kernel.entry}_norm",
            parameters=kernel.parameters + "(3Pf)(3P)" + ("i" if is_small else "2P"),
            generated=kernel.generated + norm_weight_source(self.float_weight),
            constants={
                **kernel.constants,
                **row_constants(self.columns),
                **({} if is_small else grouping),
            },
        )


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
def gemm_kernel(
    tile: Tile, policy: Policy, bfloat16: bool, has_bias: bool, norm: Norm | None = None
) -> Kernel:
    """The variant for a tile, a weight format and an output type; with a norm, unless "portable"."""
    design = _DESIGNS[tile.kind](tile, policy, norm is not None)
    offset = _weight_offset(design, policy)
    on_hopper = tile.kind != "portable"
    kernel = Kernel(
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
            "WEIGHT_BITS": policy.bits,
            "GROUP_SIZE": max(policy.group_size, 0),
            "HAS_ZEROS": policy.has_zeros,
            "WEIGHT_OFFSET": offset,
            "FRACTIONAL_ZEROS": policy.fractional_zeros,
            "BFLOAT16": bfloat16,
            "HAS_BIAS": has_bias,
            "ARRIVING_LANES": 1,
            "TILE_GROUP": 8,
        },
    )
    return kernel if norm is None else norm.added_to(kernel, tile)


def _weight_offset(design: _Design, policy: Policy) -> int:
    """What the multiplied bytes have too much beside zero points."""
    if policy.has_zeros:
        return 0
    return 128 if policy.bits == 8 else design.weight_offset


def _large(tile: Tile, policy: Policy, has_norm: bool) -> _Design:
    staging = 2 * 3 * 64 * SLAB_ROWS * 2
    fixed = 1024 + staging + 2 * tile.tokens * 8
    stage = _stage_bytes(tile, policy) + 16
    stages = (SHARED_LIMIT - fixed - has_norm * NORM_BYTES * tile.tokens) // stage
    # Unsigned weights save an instruction, signed ones power, which the largest tiles run out of.
    offset = 0 if tile.tokens == 256 else 128
    # Normed outputs are not stored.
    parameters = f"128s{'' if has_norm else '128s'}{OPERANDS}i"
    return _Design(parameters, 384, stages, fixed + stages * stage, weight_offset=offset)


def _small(tile: Tile, policy: Policy, has_norm: bool) -> _Design:
    threads = tile.rows // SLAB_ROWS * tile.interleave * 128 + 64
    blocks = 2 if REGISTERS // (2 * threads) >= 66 + tile.tokens // 2 else 1
    stage = _stage_bytes(tile, policy) + 16
    fit = (SHARED_LIMIT // blocks - 2048) // stage // tile.interleave
    stages = min(16, fit * tile.interleave)
    shared = 1024 + max(stages * stage, _sum_bytes(tile) + 16 * stages)
    return _Design(f"128s{OPERANDS}P", threads, stages, shared, blocks_per_multiprocessor=blocks)


def _portable(tile: Tile, policy: Policy, has_norm: bool) -> _Design:
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


_DESIGNS: dict[str, Callable[[Tile, Policy, bool], _Design]] = {
    "large": _large,
    "small": _small,
    "portable": _portable,
}
