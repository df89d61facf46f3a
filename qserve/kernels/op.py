"""Checks at the boundary of every op: shapes by symbol, dtypes and devices, one sentence per error."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class OpError(ValueError):
    """An op's argument breaks its contract; the message names the op, the argument and the rule."""


class Contract:
    """Collects the sizes an op's arguments agree on.

    >>> contract = Contract("quantized_linear")
    >>> contract.check("codes", codes, ("M", "K"), torch.int8)
    >>> contract.check("scale", scale, ("M",), torch.float32)

    A name binds a size at first sight and must agree after; an integer must match.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def check(
        self, name: str, tensor: Tensor, shape: tuple[str | int, ...], *dtypes: torch.dtype
    ) -> None:
        """Raise OpError unless `tensor` has this shape, one of these dtypes, and the op's device."""
        if tensor.dim() != len(shape) or not all(map(self._agrees, shape, tensor.shape)):
            self._refuse(
                f"{name} must have shape {self._describe(shape)}, not {list(tensor.shape)}"
            )
        if dtypes and tensor.dtype not in dtypes:
            self._refuse(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
        self.device = self.device or tensor.device
        if tensor.device != self.device:
            self._refuse(f"{name} is on {tensor.device}, not {self.device}")

    def require(self, condition: bool, message: str) -> None:
        """Raise OpError with the op's name and `message` unless `condition` holds."""
        if not condition:
            self._refuse(message)

    def _refuse(self, message: str) -> NoReturn:
        raise OpError(f"{self.op}: {message}")

    def _agrees(self, expected: str | int, size: int) -> bool:
        if isinstance(expected, int):
            return expected == size
        return self.sizes.setdefault(expected, size) == size

    def _describe(self, shape: tuple[str | int, ...]) -> str:
        return "[" + ", ".join(f"{s}={self.sizes.get(str(s), '?')}" for s in shape) + "]"
