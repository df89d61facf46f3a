"""Decode steps of a few sizes, recorded once each and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from qserve.engine.batch import StepShape
from qserve.engine.device import Work
from qserve.engine.scheduler import StepPlan
from qserve.kernels.transfer import upload

_NARROWEST = 32
"""Columns of the smallest page table: contexts of one split need no second kernel."""


class DecodeGraphs:
    """Chooses a recorded step for a plan, a little larger than it if need be, and replays it.

    A shape is recorded when it is first met.
    """

    def __init__(
        self,
        capture: Callable[[Work], Work],
        max_num_sequences: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        self._capture = capture
        self._sizes = tuple(batch_sizes(max_num_sequences))
        self._widths = tuple(_widths(max_pages))
        largest = StepShape.of_decodes(self._sizes[-1], self._widths[-1])
        self._inputs = torch.zeros(largest.nbytes, dtype=torch.uint8, device=device)
        self._replays: dict[StepShape, Work] = {}

    @property
    def common_shapes(self) -> list[StepShape]:
        """Those of the narrowest page table, the largest first: the others then share its memory."""
        return [StepShape.of_decodes(size, self._widths[0]) for size in reversed(self._sizes)]

    def shape_for(self, plan: StepPlan) -> StepShape | None:
        """The shape to stage the plan in; None if it is no step of decodes alone."""
        if not all(chunk.length == 1 and chunk.samples for chunk in plan.chunks):
            return None
        needed = StepShape.of(plan)
        size = next(size for size in self._sizes if size >= needed.sequences)
        width = next(width for width in self._widths if width >= needed.pages)
        return StepShape.of_decodes(size, width)

    def run(
        self, shape: StepShape, staged: Tensor, compute: Callable[[StepShape, Tensor], None]
    ) -> None:
        """Do a step of one of our shapes.

        compute: (shape, buffer with its tensors on the device), always the same; what it yields must
        go to tensors that stay where they are.
        """
        self._inputs[: shape.nbytes].copy_(upload(staged, self._inputs.device))
        if shape in self._replays:
            self._replays[shape]()
        else:
            self._replays[shape] = self._capture(lambda: compute(shape, self._inputs))


def batch_sizes(limit: int) -> Iterator[int]:
    """Batch sizes up to `limit`, finer where a step's time grows with each sequence."""
    ranges = (range(16, 64, 8), range(64, 256, 16), range(256, 512, 32))
    for size in chain((1, 2, 4, 8), *ranges, range(512, limit, 64)):
        if size < limit:
            yield size
    yield limit


def _widths(limit: int) -> Iterator[int]:
    """Columns of page tables up to `limit`, each four times the one before."""
    width = _NARROWEST
    while width < limit:
        yield width
        width *= 4
    yield limit
