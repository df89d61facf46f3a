"""Kernel launches, counted or made differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from qserve.kernels.jit import Kernel


@contextmanager
def count_launches() -> Iterator[list[Kernel]]:
    """The kernels launched through `kernels.jit` inside the block, in order."""
    launched: list[Kernel] = []

    def count(kernel: Kernel) -> Kernel:
        launched.append(kernel)
        return kernel

    with launching(count):
        yield launched


@contextmanager
def without_overlap() -> Iterator[None]:
    """Kernels launched inside the block begin only once their predecessors have ended."""
    with launching(_serial):
        yield


@contextmanager
def every_lane_arriving() -> Iterator[None]:
    """In kernels launched inside the block, each lane of a warp waits and arrives at barriers for
    itself.

    For a checker that does not see that `__syncwarp` orders the lanes of a warp before one of them
    arrives at a barrier for all, or after one of them has waited there.
    """
    with launching(_every_lane_arriving):
        yield


@contextmanager
def launching(instead: Callable[[Kernel], Kernel]) -> Iterator[None]:
    """Launches inside the block are of the kernel that `instead` gives for the one meant."""
    launch = Kernel.__call__
    Kernel.__call__ = lambda self, *call: launch(instead(self), *call)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernel.__call__ = launch  # type: ignore[method-assign]


@cache
def _every_lane_arriving(kernel: Kernel) -> Kernel:
    lanes = {"ARRIVING_LANES": 32} if "ARRIVING_LANES" in kernel.constants else {}
    return replace(kernel, constants={**kernel.constants, **lanes}, _loaded={})


@cache
def _serial(kernel: Kernel) -> Kernel:
    return replace(kernel, overlap=False, _loaded={})
