"""What differs between devices for the engine, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qserve.config import EngineConfig
from qserve.formats.layout import PAGE_TOKENS

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work on tensors that stay where they are; calling the result does the work again."""


@dataclass(frozen=True)
class StepLimits:
    """Sequences and tokens of a step, and tokens of a sequence, at most."""

    max_num_sequences: int
    max_batched_tokens: int
    max_model_len: int

    @property
    def max_pages(self) -> int:
        """Of one sequence."""
        return -(-self.max_model_len // PAGE_TOKENS)


@dataclass(frozen=True)
class DevicePolicy:
    """How the engine uses a device.

    steps_ahead: steps launched before the results of the one before them are read, 0 or 1.
    max_num_sequences, max_batched_tokens: for settings that leave them open.
    capture: how decode steps are recorded to be replayed; None: every step is launched op by op.
    """

    steps_ahead: int
    max_num_sequences: int
    max_batched_tokens: int
    capture: Capture | None

    @classmethod
    def of(cls, device: torch.device) -> DevicePolicy:
        """On a GPU the host works while the device does; on a CPU it would only wait for itself."""
        if device.type == "cpu":
            return cls(0, 64, 1024, None)
        return cls(1, 1024, 8192, GraphRecorder())

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

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work` once, which compiles and loads what it needs, then record it."""
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
