"""What differs between devices for the engine, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from qserve.config import EngineConfig
from qserve.formats.layout import PAGE_TOKENS

Work = Callable[[], None]


@dataclass(frozen=True)
class StepLimits:
    """Sequences and tokens of a step, and tokens of a sequence, at most."""

    max_num_sequences: int
    max_batched_tokens: int
    max_model_len: int

    @property
    def max_pages(self) -> int:
        """Of one sequence."""
        return self.pages_for(self.max_model_len)

    @staticmethod
    def pages_for(num_tokens: int) -> int:
        return -(-num_tokens // PAGE_TOKENS)


@dataclass(frozen=True)
class DevicePolicy:
    """How the engine uses a device.

    steps_ahead: steps launched before the results of the one before them are read, 0 or 1.
    max_num_sequences, max_batched_tokens: for settings that leave them open.
    capture: does work on tensors that stay where they are, and gives what does it again; None: every
        step is launched op by op.
    peak_bytes: does work, and gives the memory that it took at most beyond what was in use; None:
        the device's memory is not the engine's alone to plan.
    prepare: gets ready, at once, what several pieces of work will need; None: nothing is to be.
    """

    steps_ahead: int
    max_num_sequences: int
    max_batched_tokens: int
    capture: Callable[[Work], Work] | None = None
    peak_bytes: Callable[[Work], int] | None = None
    prepare: Callable[[Iterable[Callable[[], object]]], None] | None = None

    @classmethod
    def of(cls, device: torch.device) -> DevicePolicy:
        """On a GPU the host works while the device does; on a CPU it would only wait for itself."""
        if device.type == "cpu":
            return cls(0, 64, 1024)
        return cls(1, 1024, 8192, GraphRecorder(), peak_bytes, compile_kernels)

    def limits(self, config: EngineConfig, max_model_len: int) -> StepLimits:
        """The settings, with nothing left open."""
        sequences = config.max_num_sequences or self.max_num_sequences
        tokens = config.max_batched_tokens or max(self.max_batched_tokens, sequences)
        return StepLimits(min(sequences, tokens), tokens, max_model_len)


class GraphRecorder:
    """Records work as CUDA graphs, which share one pool of memory: only one may run at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, work: Work) -> Work:
        """Do `work` once, which loads what it needs, then record it."""
        work()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay


def peak_bytes(work: Work) -> int:
    """Memory of the GPU that `work` takes at most, beyond what was in use; none of it is kept."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return peak


def compile_kernels(works: Iterable[Callable[[], object]]) -> None:
    """Compile, in parallel, and load the kernels that pieces of work will launch."""
    from qserve.kernels.jit import listing, warm_up

    with listing() as kernels:
        for work in works:
            work()
    warm_up(kernels, torch.device("cuda", torch.cuda.current_device()))
