"""Compile every kernel variant for an architecture, without a GPU, and say what each one takes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from qserve.formats.kv import KVFormat
from qserve.kernels.decode_cuda import DecodeShape, combine_kernel, decode_kernel, plan_kernel
from qserve.kernels.draw_cuda import draw_kernel
from qserve.kernels.gemm_norm_cuda import NORM_TILES
from qserve.kernels.gemm_variants import Norm, Policy, gemm_kernel
from qserve.kernels.jit import Build, Kernel, KernelError, build_all
from qserve.kernels.kv_append_cuda import AppendShape, append_kernel
from qserve.kernels.op import FLOAT_DTYPES
from qserve.kernels.prefill_cuda import gather_kernel
from qserve.kernels.prefill_sm90_cuda import prefill_kernel
from qserve.kernels.producers_cuda import PRODUCERS, producer_kernel
from qserve.kernels.round_columns_cuda import round_columns_kernel
from qserve.kernels.sass_check import disassemble, hazards
from qserve.kernels.tiles import Tile, tiles_for

LARGEST_STACK = 50
"""Bytes of stack frame a kernel may have; more means that registers went to memory."""

POLICIES = (
    Policy(),
    Policy(group_size=64),
    Policy(group_size=128),
    Policy(fractional_zeros=True),
    Policy(bits=8),
)
MULTIPROCESSORS = 132
"""Of the GPUs whose norms of many tokens are compiled here."""

PRODUCER_COLUMNS = (576, 4096, 14336, 28672)
HEAD_COUNTS = ((32, 8), (32, 32), (9, 3))
FLOAT16_TYPES = (torch.float16, torch.bfloat16)
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10}
"""Shared memory one block may have."""


@dataclass(frozen=True)
class Resources:
    """What the assembler says of one variant."""

    variant: str
    arch: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int

    @classmethod
    def of(cls, kernel: Kernel, arch: str, built: Build) -> Resources:
        """Parsed from the assembler's report, which covers every entry of the source."""
        report = built.log.split(f"Compiling entry function '{kernel.entry}'", 1)[-1]
        static = re.search(r"(\d+) bytes smem", report.split("Compiling entry")[0])
        return cls(
            str(kernel),
            arch,
            _number(r"Used (\d+) registers", report),
            _number(r"(\d+) bytes stack frame", report),
            _number(r"(\d+) bytes spill stores", report),
            kernel.shared_bytes + (int(static[1]) if static else 0),
        )

    def faults(self) -> list[str]:
        """Why the variant may not be used; empty when all is well."""
        faults = []
        if self.spilled_bytes:
            faults.append(f"{self.variant} for {self.arch} spills {self.spilled_bytes} bytes")
        if self.stack_bytes > LARGEST_STACK:
            faults.append(
                f"{self.variant} for {self.arch}: stack frame of {self.stack_bytes} bytes"
            )
        return faults


def gemm_variants(arch: str) -> list[Kernel]:
    """Every GEMM variant of an architecture."""
    choices = itertools.product(tiles_for(arch), POLICIES, (False, True), (False, True))
    return [gemm_kernel(*choice) for choice in choices]


def norm_variants(arch: str) -> list[Kernel]:
    """The GEMMs that go on with a norm, as an H100 or H200 runs them."""
    tiles = [t for t in tiles_for(arch) if t.kind == "small" or t in NORM_TILES]
    choices = itertools.product(tiles, POLICIES[:3], (False, True), (2048, 4096, 8192))
    return [
        gemm_kernel(tile, policy, True, bias, Norm(columns, False, _token_tiles(tile, columns)))
        for tile, policy, bias, columns in choices
    ]


def _token_tiles(tile: Tile, columns: int) -> int:
    return MULTIPROCESSORS * tile.rows // columns if tile in NORM_TILES else 1


def producer_variants() -> list[Kernel]:
    """The producers, for a few row lengths."""
    choices = itertools.product(PRODUCERS, PRODUCER_COLUMNS, (False, True))
    return [producer_kernel(op, columns, bfloat16, False) for op, columns, bfloat16 in choices]


def attention_variants(arch: str) -> list[Kernel]:
    """Append, decode and gather, for a few cache formats and head counts."""
    kernels = [plan_kernel()]
    for bits, head_dim, (heads, kv_heads) in itertools.product((4, 8), (64, 128), HEAD_COUNTS):
        kv_format, dtype = KVFormat(bits, head_dim, kv_heads), torch.float16
        shared, overlap = SHARED_BYTES[arch], arch == "sm_90a"
        kernels += [
            append_kernel(AppendShape(kv_format, heads, dtype, True, True)),
            decode_kernel(DecodeShape(kv_format, heads, dtype, shared, overlap)),
            combine_kernel(heads, head_dim, dtype),
            gather_kernel(kv_format, dtype),
        ]
    return kernels


def prefill_variants(arch: str) -> list[Kernel]:
    """Attention of prompt chunks straight from pages, which is for Hopper."""
    choices = itertools.product((4, 8), (64, 128), HEAD_COUNTS, FLOAT16_TYPES)
    return [
        prefill_kernel(KVFormat(bits, head_dim, kv_heads), heads // kv_heads, dtype)
        for bits, head_dim, (heads, kv_heads), dtype in choices
        if arch == "sm_90a"
    ]


def draw_variants() -> list[Kernel]:
    """Drawing tokens from logits of every type."""
    return [draw_kernel(dtype) for dtype in FLOAT_DTYPES]


def all_variants(arch: str) -> list[Kernel]:
    """Every kernel variant of an architecture."""
    return [
        *gemm_variants(arch),
        *norm_variants(arch),
        *producer_variants(),
        *attention_variants(arch),
        *prefill_variants(arch),
        *draw_variants(),
        round_columns_kernel(),
    ]


def compile_kernels(archs: Sequence[str]) -> list[Resources]:
    """Compile every variant for every arch and print its resources.

    Raises KernelError if one does not compile, spills, or keeps its registers in memory.
    """
    unknown = [arch for arch in archs if arch not in SHARED_BYTES]
    if unknown:
        raise KernelError(f"unknown arch {unknown[0]}; known are {', '.join(SHARED_BYTES)}")
    resources = [row for arch in archs for row in inspect(all_variants(arch), arch)]
    print(f"{'arch':8} {'registers':>9} {'stack':>6} {'spilled':>8} {'shared':>8}  variant")
    for row in resources:
        print(
            f"{row.arch:8} {row.registers:9d} {row.stack_bytes:6d} {row.spilled_bytes:8d} "
            f"{row.shared_bytes:8d}  {row.variant}"
        )
    require_sound(resources)
    return resources


def inspect(kernels: Sequence[Kernel], arch: str) -> list[Resources]:
    """Compile variants in parallel; what each takes."""
    builds = build_all(kernels, arch)
    return [Resources.of(k, arch, built) for k, built in zip(kernels, builds, strict=True)]


def require_sound(resources: Iterable[Resources]) -> None:
    """Raise KernelError naming every variant that spills or has a large stack frame."""
    faults = [fault for row in resources for fault in row.faults()]
    if faults:
        raise KernelError("; ".join(faults))


def require_no_hazards(kernels: Sequence[Kernel], arch: str) -> None:
    """Raise KernelError if a variant reuses a register that a multiply in flight still reads.

    Needs cuobjdump; raises FileNotFoundError where there is none.
    """
    with ThreadPoolExecutor() as pool:
        listings = pool.map(lambda built: disassemble(built.cubin), build_all(kernels, arch))
        found = [
            f"{k}: {h}" for k, sass in zip(kernels, listings, strict=True) for h in hazards(sass)
        ]
    if found:
        raise KernelError("registers reused under a multiply in flight: " + "; ".join(found))


def _number(pattern: str, report: str) -> int:
    match = re.search(pattern, report)
    if match is None:
        raise KernelError(f"the assembler's report lacks {pattern!r}")
    return int(match[1])
