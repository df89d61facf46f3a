"""A step between its launch and the time its results are needed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from torch import Tensor

from qserve.engine.logprobs import Place, ScoredTokens, Scores, entries
from qserve.engine.request import TokenLogprob
from qserve.engine.scheduler import StepPlan
from qserve.kernels.transfer import Readback


class StepUnderWay:
    """Launched on a device, its results on their way to the host.

    token_ids: int64 [S], the tokens sampled. scored: tokens whose scores are asked for.
    """

    def __init__(self, plan: StepPlan, token_ids: Tensor, scored: Iterable[ScoredTokens]) -> None:
        scored = list(scored)
        self.plan = plan
        self._places = [places for places, _ in scored]
        tensors = [tensor for _, scores in scored for tensor in scores]
        self._results = Readback([token_ids, *tensors])

    def wait(self) -> tuple[list[int], list[tuple[Place, TokenLogprob]]]:
        """The tokens sampled and the scores, once the device has them."""
        token_ids, *rest = self._results.wait()
        tensors = iter(rest)
        scored = [
            ScoredTokens(places, Scores(*islice(tensors, len(Scores._fields))))
            for places in self._places
        ]
        return token_ids.tolist(), list(entries(scored))
