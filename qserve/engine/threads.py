"""How many threads a CPU step is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qserve.models.config import ModelConfig
from qserve.models.names import linear_shapes

SHARED_WORK = 100_000_000
"""Multiply-adds of a layer below which waking other threads costs more than they save. Measured on
two cores: waking them takes about 2 ms a layer, all ops together, as much as half of this work."""

BOUND_BY_MEMORY = 10
"""Reading a weight takes as long as multiplying it by this many tokens."""


class StepThreads:
    """Runs steps of little work on one thread; other devices are left alone."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        layer_size = sum(rows * columns for rows, columns in linear_shapes(config).values())
        on_cpu = device.type == "cpu"
        self._least_tokens = SHARED_WORK / layer_size if on_cpu else 0.0

    @contextmanager
    def for_tokens(self, num_tokens: int) -> Iterator[None]:
        """The number of threads for a step of `num_tokens`, the process's own again after it."""
        if max(num_tokens, BOUND_BY_MEMORY) >= self._least_tokens:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
