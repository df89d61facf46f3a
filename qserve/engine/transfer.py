"""Values on their way between host and device, without the host waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of host values; on a GPU it is on its way without the host waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


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
