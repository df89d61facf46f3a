"""Kernels compile for every architecture without a GPU, spill nothing, and race with no multiply."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.core")

from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels import jit
from qserve.kernels.compile import (
    POLICIES,
    Resources,
    attention_variants,
    compile_kernels,
    draw_variants,
    inspect,
    norm_variants,
    prefill_variants,
    producer_variants,
    require_no_hazards,
    require_sound,
)
from qserve.kernels.gemm_variants import Policy, gemm_kernel
from qserve.kernels.jit import Kernel, KernelError, build
from qserve.kernels.sass_check import count_multiplies, disassemble, hazards
from qserve.kernels.tiles import Tile, tiles_for

HAS_DISASSEMBLER = shutil.which("cuobjdump") is not None or find_spec("triton") is not None


def gemm_sample(arch: str, kind: str) -> list[Kernel]:
    """Every tile with every way to multiply, one with fractional zeros; output types alternate."""
    tiles = [tile for tile in tiles_for(arch) if tile.kind == kind]
    pairs = [(tile, policy) for tile in tiles for policy in POLICIES if not policy.fractional_zeros]
    pairs.append((tiles[0], Policy(fractional_zeros=True)))
    return [
        gemm_kernel(tile, policy, i % 2 == 1, i % 3 == 1) for i, (tile, policy) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("sm_80", "portable"), ("sm_89", "portable"), ("sm_90a", "small"), ("sm_90a", "large")],
)
def test_every_gemm_tile_compiles_soundly(arch: str, kind: str) -> None:
    """No spills, no large stack frames, and no register reused under a multiply in flight."""
    kernels = gemm_sample(arch, kind)
    require_sound(inspect(kernels, arch))
    if arch == "sm_90a" and HAS_DISASSEMBLER:
        require_no_hazards(kernels, arch)


def test_gemms_with_a_norm_compile_soundly() -> None:
    kernels = norm_variants("sm_90a")[4::5]  # every tile; formats and lengths of rows alternate
    require_sound(inspect(kernels, "sm_90a"))
    if HAS_DISASSEMBLER:
        require_no_hazards(kernels, "sm_90a")


def test_prefill_attention_compiles_soundly_and_is_not_serialised() -> None:
    kernels = prefill_variants("sm_90a")
    require_sound(inspect(kernels, "sm_90a"))
    for kernel in kernels:
        assert "wgmma" not in build(kernel, "sm_90a").log, "the assembler serialises the multiplies"
    if HAS_DISASSEMBLER:
        require_no_hazards(kernels, "sm_90a")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_all_other_kernels_compile_without_spills(arch: str) -> None:
    kernels = producer_variants() + attention_variants(arch) + draw_variants()
    require_sound(inspect(kernels, arch))


def test_an_unknown_arch_is_refused() -> None:
    with pytest.raises(KernelError, match="unknown arch sm_70; known are sm_80"):
        compile_kernels(["sm_80", "sm_70"])


@pytest.mark.skipif(not HAS_DISASSEMBLER, reason="needs cuobjdump")
def test_a_planted_hazard_is_found() -> None:
    kernel = gemm_kernel(Tile("large", 128, 256, 2), POLICIES[2], False, False)
    sass = disassemble(build(kernel, "sm_90a").cubin)
    assert count_multiplies(sass) == 8
    assert hazards(sass) == []
    # After the last multiply of the first group, overwrite a register of its weights.
    group_end = re.search(r"IGMMA\S* R\d+, R(\d+), gdesc\S*, R\d+, gsb0[^\n]*\n[^\n]*\n", sass)
    assert group_end is not None
    write = f"        /*fff8*/                   LDS R{group_end[1]}, [R2] ;   /* 0x0 */\n"
    planted = sass[: group_end.end()] + write + sass[group_end.end() :]
    assert [hazard.instruction.opcode for hazard in hazards(planted)] == ["LDS"]


def test_a_spill_is_refused() -> None:
    with pytest.raises(KernelError, match="k for sm_80 spills 8 bytes"):
        require_sound([Resources("k", "sm_80", 255, 8, 8, 0)])
    with pytest.raises(KernelError, match="stack frame of 88 bytes"):
        require_sound([Resources("k", "sm_80", 255, 88, 0, 0)])


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty source folder and an empty cache."""
    monkeypatch.setattr(jit, "CSRC", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_compiler_messages_name_file_and_line(csrc: Path) -> None:
    (csrc / "part.cuh").write_text("// nothing\n")
    (csrc / "bad.cu").write_text('#include "part.cuh"\n\nint broken = ;\n')
    with pytest.raises(KernelError, match=r"bad\.cu\(3\): error: expected an expression"):
        build(Kernel("bad.cu", "k", "P", 32), "sm_80")


def test_numbers_of_the_formats_reach_the_source(csrc: Path) -> None:
    check = f"static_assert(PAGE_TOKENS == {PAGE_TOKENS} && WIDTH == 3);\n"
    (csrc / "k.cu").write_text(check + 'extern "C" __global__ void k() {}\n')
    build(Kernel("k.cu", "k", "", 32, constants={"WIDTH": 3}), "sm_80")
    with pytest.raises(KernelError, match="static assertion failed"):
        build(Kernel("k.cu", "k", "", 32, constants={"WIDTH": 4}), "sm_80")


def test_cubins_are_kept_by_content(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = csrc / "k.cu"
    source.write_text('extern "C" __global__ void k(float* x) { x[0] = 1; }\n')
    first = build(Kernel("k.cu", "k", "P", 32), "sm_80")
    source.write_text('extern "C" __global__ void k(float* x) { x[0] = 2; }\n')
    assert build(Kernel("k.cu", "k", "P", 32), "sm_80") != first
    source.write_text('extern "C" __global__ void k(float* x) { x[0] = 1; }\n')
    monkeypatch.setattr(jit, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build(Kernel("k.cu", "k", "P", 32), "sm_80") == first
    assert not [
        path for path in jit.cache_directory().iterdir() if path.suffix not in (".cubin", ".log")
    ]


def test_parameter_formats() -> None:
    formats = Kernel("k.cu", "k", "128s(2Pi)3Pf", 32).parameter_formats()
    assert formats == ["128s", "2Pi", "P", "P", "P", "f"]


def test_old_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    jit.device_arch.cache_clear()
    with pytest.raises(KernelError, match=r"compute capability 7\.5; 8\.0 is the oldest served"):
        jit.device_arch(0)


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    for cached in (jit._core, jit._compiler_version):
        cached.cache_clear()
        monkeypatch.setattr(jit, cached.__name__, cached.__wrapped__)
    with pytest.raises(KernelError, match=r"pip install 'qserve\[gpu\]'"):
        build(Kernel("producers.cu", "rms_norm", "P", 32), "sm_80")
