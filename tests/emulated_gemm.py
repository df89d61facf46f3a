"""The Hopper GEMMs, their own code, on a CPU: in the emulator, and with a fault in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from emulator import Emulator, tensor_map

from qserve.formats.grid import fit_grid
from qserve.formats.weight import QuantizedWeight, W8Weight
from qserve.kernels import gemm_cuda, jit
from qserve.kernels.gemm_variants import gemm_kernel
from qserve.kernels.jit import Kernel
from qserve.kernels.tiles import Device


def device_of(multiprocessors: int) -> Device:
    """What weights are told that they are on."""
    return Device("emulated", "sm_90a", multiprocessors)


@contextmanager
def emulated_launches(directory: Path, multiprocessors: int) -> Iterator[Emulator]:
    """Every kernel launched inside the block runs in an emulator."""
    emulator = Emulator(directory)
    device = device_of(multiprocessors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "CSRC", emulator.sources)
        patch.setattr(gemm_cuda, "_device", lambda _: device)
        patch.setattr(gemm_cuda, "tensor_map", tensor_map)
        patch.setattr(Kernel, "__call__", lambda *arguments: emulator.launch(*arguments))
        yield emulator


def quantized(weight: torch.Tensor, weight_format: str) -> QuantizedWeight:
    """weight_format: "int8", "channel", "group64" or "group128"."""
    if weight_format == "int8":
        return W8Weight.quantize(weight)
    grid = fit_grid(weight, {"channel": -1, "group64": 64, "group128": 128}[weight_format])
    return grid.pack(grid.quantize(weight))


@contextmanager
def planted(source: Path, sound: str, faulty: str) -> Iterator[None]:
    """GEMMs are compiled from sources with a fault; nothing of what it has done stays."""
    text = source.read_text()
    assert sound in text
    source.write_text(text.replace(sound, faulty))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm_cuda, "gemm_kernel", cache(gemm_kernel.__wrapped__))
        try:
            yield
        finally:
            source.write_text(text)
            for shared in (gemm_cuda._inbox, gemm_cuda._parts):
                shared.cache_clear()
