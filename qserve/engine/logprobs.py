"""Log probabilities of sampled and of prompt tokens, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from qserve.engine.batch import to_device
from qserve.engine.request import TokenLogprob
from qserve.engine.scheduler import ScheduledChunk, StepPlan
from qserve.engine.sequence import Sequence

PROMPT_ROWS = 128
"""Prompt positions scored at once: their logits over the whole vocabulary are large."""


class PromptScore(NamedTuple):
    sequence: Sequence
    position: int
    logprob: TokenLogprob


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprob]:
    """Scores of token_ids int64 [n] under logits [n, V], with the `num_top` likeliest tokens
    each."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(num_top, dim=-1)
    columns = (token_ids, chosen[:, 0], ranks, top.indices, top.values)
    return [
        TokenLogprob(token_id, logprob, rank, tuple(zip(top_ids, top_values, strict=True)))
        for token_id, logprob, rank, top_ids, top_values in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


@torch.inference_mode()
def sampled_logprobs(
    plan: StepPlan, logits: Tensor, token_ids: Tensor
) -> Mapping[Sequence, TokenLogprob]:
    """Scores of the tokens a step sampled, token_ids [S], for the sequences that ask for them."""
    scores: dict[Sequence, TokenLogprob] = {}
    for row, sequence in enumerate(plan.sampled):
        num_top = sequence.params.logprobs
        if num_top is not None:
            rows = slice(row, row + 1)
            (scores[sequence],) = token_logprobs(logits[rows], token_ids[rows], num_top)
    return scores


@torch.inference_mode()
def prompt_logprobs(
    plan: StepPlan, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> Iterator[PromptScore]:
    """Scores of the prompt tokens that follow the step's, for the sequences that ask for them.

    hidden [T, H] are the states of the step; must be called before it is committed.
    """
    starts = accumulate((chunk.length for chunk in plan.chunks), initial=0)
    for chunk, start in zip(plan.chunks, starts, strict=False):
        if chunk.sequence.needs_prompt_logprobs:
            yield from _chunk_logprobs(chunk, hidden[start : start + chunk.length], logits_of)


def _chunk_logprobs(
    chunk: ScheduledChunk, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> Iterator[PromptScore]:
    sequence = chunk.sequence
    num_top = sequence.params.prompt_logprobs or 0
    first = chunk.start + 1
    targets = sequence.token_ids[first : min(first + chunk.length, sequence.num_prompt_tokens)]
    for begin in range(0, len(targets), PROMPT_ROWS):
        token_ids = to_device(targets[begin : begin + PROMPT_ROWS], hidden.device)
        logits = logits_of(hidden[begin : begin + len(token_ids)])
        for offset, logprob in enumerate(token_logprobs(logits, token_ids, num_top)):
            yield PromptScore(sequence, first + begin + offset, logprob)
