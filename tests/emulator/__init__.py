"""Kernels of `csrc/` on a CPU: compiled as C++ over a runtime that emulates a block's threads.

The headers beside this file replace those of `csrc/` that speak to the hardware; all else is what a
GPU runs. Schedules are random, so a missing barrier shows as a wrong result or a deadlock.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qserve.kernels import jit
from qserve.kernels.jit import Kernel

HERE = Path(__file__).parent
COMPILE = ["g++", "-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-pthread"]
ENTRY = """
extern "C" const char* launch(const void* const* parameters, unsigned x, unsigned y, unsigned z,
                              int threads, unsigned cluster, unsigned seed, int longest_copy,
                              bool side_by_side) {{
  return run_grid({{x, y, z}}, threads, cluster, seed, longest_copy, side_by_side,
                  bind({entry}, parameters));
}}
"""


class EmulationError(RuntimeError):
    """A kernel deadlocks or misuses what its threads share."""


class Emulator:
    """Compiles kernels into `directory` and runs them.

    seed: of the schedule. longest_copy: steps of the schedule that a copy may take. side_by_side: the
    blocks of a grid run at the same time.
    """

    def __init__(self, directory: Path) -> None:
        self.seed = 0
        self.longest_copy = 2000
        self.side_by_side = False
        self._directory = directory
        self._libraries: dict[int, tuple[Kernel, ctypes.CDLL]] = {}
        self.sources = directory / "csrc"
        shutil.copytree(jit.CSRC, self.sources)
        for header in (*HERE.glob("*.cuh"), *HERE.glob("*.hpp")):
            shutil.copy(header, self.sources)
        self._runtime = self._compile_runtime()

    def launch(
        self, kernel: Kernel, device: torch.device, grid: Sequence[int], arguments: Sequence[Any]
    ) -> None:
        """What `Kernel.__call__` does on a GPU, for tensors on the CPU."""
        values = iter(x.data_ptr() if isinstance(x, torch.Tensor) else x or 0 for x in arguments)
        parameters = (ctypes.c_char_p * len(kernel.parameter_formats()))(
            *(_packed(layout, values) for layout in kernel.parameter_formats())
        )
        size = (*grid, 1, 1)[:3]
        library = self._library(kernel)
        schedule = (self.seed, self.longest_copy, self.side_by_side)
        error = library.launch(parameters, *size, kernel.threads, kernel.cluster, *schedule)
        if error is not None:
            raise EmulationError(f"{kernel}: {error.decode()}")

    def _compile_runtime(self) -> tuple[str | Path, ...]:
        """Once, since it takes longer than a kernel. Returns what compiles a kernel over it."""
        header, code = self.sources / "runtime.hpp", self._directory / "runtime.o"
        _run_compiler("-x", "c++-header", header, "-o", f"{header}.gch")
        _run_compiler("-c", HERE / "runtime.cpp", f"-I{self.sources}", "-o", code)
        return "-shared", "-include", header, code

    def _library(self, kernel: Kernel) -> ctypes.CDLL:
        if id(kernel) not in self._libraries:
            self._libraries[id(kernel)] = kernel, self._compile(kernel)
        return self._libraries[id(kernel)][1]

    def _compile(self, kernel: Kernel) -> ctypes.CDLL:
        source = self._directory / f"{kernel.entry}{len(self._libraries)}.cpp"
        is_multiply = "wgmma" in kernel.generated  # which our sources have, for both signs
        unsigned = str(".u8." in kernel.generated).lower()
        text = f"constexpr bool UNSIGNED_WEIGHTS = {unsigned};\n"
        lines = kernel.generated.splitlines(keepends=True)
        text += "".join(x for x in lines if not is_multiply or x.startswith("using "))
        fresh = dataclasses.replace(kernel, generated=text)
        source.write_text(fresh.text + ENTRY.format(entry=kernel.entry))
        library = source.with_suffix(".so")
        _run_compiler(*self._runtime, source, "-o", library)
        loaded = ctypes.CDLL(str(library))
        loaded.launch.restype = ctypes.c_char_p
        return loaded


def _run_compiler(*arguments: str | Path) -> None:
    subprocess.run([*COMPILE, *map(str, arguments)], check=True)


def _packed(layout: str, values: Iterator[Any]) -> bytes:
    """One parameter, from as many values as it has fields."""
    fields = struct.Struct(f"@{layout}0q")
    count = len(fields.unpack(bytes(fields.size)))
    return fields.pack(*itertools.islice(values, count))


def tensor_map(matrix: torch.Tensor, box: tuple[int, int]) -> bytes:
    """What `kernels.tensor_map.tensor_map` does on a GPU."""
    size = matrix.element_size()
    return struct.pack("5Q88x", matrix.data_ptr(), size, *matrix.shape, box[0])
