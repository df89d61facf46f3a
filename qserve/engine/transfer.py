"""Tensors on their way to the host, without the host waiting for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Readback:
    """Tensors of one device on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrival = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they are there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors
