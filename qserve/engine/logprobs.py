"""Log probabilities of sampled and of prompt tokens, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from qserve.engine.request import TokenLogprob
from qserve.engine.sampler import Row
from qserve.engine.scheduler import ScheduledChunk, StepPlan
from qserve.engine.sequence import Sequence
from qserve.kernels.transfer import to_device

ROWS_AT_ONCE = 128
"""Tokens scored at once: their logits over the whole vocabulary are large."""


class Place(NamedTuple):
    """A token by its position in a sequence, and how many likelier ones are asked for beside it."""

    sequence: Sequence
    position: int
    num_top: int


class Scores(NamedTuple):
    """Of n tokens: int64 [n], float32 [n], int64 [n], int64 [n, k], float32 [n, k]."""

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, num_top: int) -> Scores:
        """Of token_ids int64 [n] under logits [n, V], with the `num_top` likeliest tokens each."""
        logprobs = logits.float().log_softmax(dim=-1)
        chosen = logprobs.gather(1, token_ids[:, None])
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        top = logprobs.topk(num_top, dim=-1)
        return cls(token_ids, chosen[:, 0], ranks, top.indices, top.values)

    def entries(self) -> Iterator[TokenLogprob]:
        """One per token; the tensors must be on the host."""
        for token_id, logprob, rank, ids, logprobs in zip(*map(Tensor.tolist, self), strict=True):
            yield TokenLogprob(token_id, logprob, rank, tuple(zip(ids, logprobs, strict=True)))


class ScoredTokens(NamedTuple):
    """Scores, and what they are scores of."""

    places: list[Place]
    scores: Scores


@torch.inference_mode()
def score_sampled(rows: list[Row], logits: Tensor, token_ids: Tensor) -> Iterator[ScoredTokens]:
    """The tokens that a step sampled, token_ids [S], of the sequences that ask for their scores."""
    wanted = [(i, row) for i, row in enumerate(rows) if row.params.logprobs is not None]
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        part = wanted[start : start + ROWS_AT_ONCE]
        index = to_device([i for i, _ in part], logits.device)
        places = [Place(row.sequence, row.num_tokens, row.params.logprobs or 0) for _, row in part]
        yield _scored(places, logits[index], token_ids[index])


@torch.inference_mode()
def score_prompts(
    plan: StepPlan, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> Iterator[ScoredTokens]:
    """The prompt tokens that follow a step's, of the sequences that ask for their scores.

    hidden [T, H] are the states of the step; must be called before it is committed.
    """
    starts = accumulate((chunk.length for chunk in plan.chunks), initial=0)
    for chunk, start in zip(plan.chunks, starts, strict=False):
        if chunk.sequence.needs_prompt_logprobs:
            yield from _score_chunk(chunk, hidden[start : start + chunk.length], logits_of)


def _score_chunk(
    chunk: ScheduledChunk, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> Iterator[ScoredTokens]:
    sequence = chunk.sequence
    num_top = sequence.params.prompt_logprobs or 0
    end = min(chunk.end + 1, sequence.num_prompt_tokens)
    for first in range(chunk.start + 1, end, ROWS_AT_ONCE):
        positions = range(first, min(first + ROWS_AT_ONCE, end))
        places = [Place(sequence, position, num_top) for position in positions]
        token_ids = to_device(sequence.token_ids[first : positions.stop], hidden.device)
        rows = hidden[first - chunk.start - 1 :][: len(positions)]
        yield _scored(places, logits_of(rows), token_ids)


def _scored(places: list[Place], logits: Tensor, token_ids: Tensor) -> ScoredTokens:
    return ScoredTokens(places, Scores.of(logits, token_ids, max(p.num_top for p in places)))


def entries(scored: Iterable[ScoredTokens]) -> Iterator[tuple[Place, TokenLogprob]]:
    """Each token with what its place asked for; the tensors must be on the host."""
    for places, scores in scored:
        for place, entry in zip(places, scores.entries(), strict=True):
            yield place, entry._replace(top=entry.top[: place.num_top])
