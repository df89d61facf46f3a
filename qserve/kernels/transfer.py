"""Values on their way between the host and a device, without the host waiting for them.

On a GPU they move on streams of their own, beside what it is at work on: the copies of a step are
small, but each would hold up the kernel behind it for 10 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of host values."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else upload(tensor.pin_memory(), device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of a tensor on the host, which must be pinned for a GPU."""
    if device.type == "cpu":
        return tensor
    working, copying = torch.cuda.current_stream(), _stream("upload")
    with torch.cuda.stream(copying):
        moved = tensor.to(device, non_blocking=True)
    working.wait_stream(copying)
    moved.record_stream(working)  # whose work it must outlive
    return moved


class Readback:
    """Tensors of one device on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sources = list(tensors)  # not to be used again before they are read
        self._arrival = None
        if not any(tensor.is_cuda for tensor in tensors):
            self._tensors = self._sources
            return
        copying = _stream("readback")
        copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copying):
            self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
            self._arrival = copying.record_event()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they are there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors


@cache
def _stream(direction: str) -> torch.cuda.Stream:
    """Of the process's GPU; the two directions do not wait for each other."""
    return torch.cuda.Stream()
