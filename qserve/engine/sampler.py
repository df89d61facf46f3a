"""Choosing tokens: every row by its own parameters, on the logits' device, without a host sync.

A row's token is a function of its logits, its parameters, its text so far and its seed alone: the
noise is a hash of (seed, position), not a generator's state. So a seeded request yields the same
tokens whatever runs beside it, however its prompt is cut, and after any preemption.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from qserve.engine.request import SamplingParams
from qserve.engine.sequence import Sequence
from qserve.engine.token_counts import TokenCounts
from qserve.kernels.draw import draw_tokens, pack_draws
from qserve.kernels.transfer import to_device


class Row(NamedTuple):
    """A sequence whose next token is chosen, and its tokens so far, those under way included."""

    sequence: Sequence
    num_tokens: int

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def must_go_on(self) -> bool:
        """Whether it is too short to end."""
        num_output_tokens = self.num_tokens - self.sequence.num_prompt_tokens
        too_short = num_output_tokens < self.params.min_tokens
        return too_short and bool(self.sequence.end_token_ids)

    @property
    def has_penalties(self) -> bool:
        params = self.params
        additive = params.presence_penalty != 0 or params.frequency_penalty != 0
        return additive or params.repetition_penalty != 1

    @property
    def is_adjusted(self) -> bool:
        """Whether its logits change before a token is drawn."""
        guided = self.sequence.guide is not None
        return guided or self.has_penalties or bool(self.params.logit_bias) or self.must_go_on


Rows = list[Row]

ROWS_AT_ONCE = 128
"""Rows whose logits are adjusted at a time, which bounds the memory that a step takes."""

_GOLDEN_RATIO = numpy.uint64(0x9E3779B97F4A7C15)  # its multiples spread evenly over 64 bits


class Sampler:
    """Chooses tokens; keeps on the device what sequences with penalties have been given so far."""

    def __init__(self) -> None:
        self._counts = TokenCounts()

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Rows) -> Tensor:
        """The next token of each row: logits float [B, V] -> int64 [B].

        Order as in SamplingParams. A sequence's tokens must all come from here, in order.
        """
        if not any(row.is_adjusted for row in rows):
            return draw_tokens(logits, draws_of(rows, logits))
        starts = range(0, len(rows), ROWS_AT_ONCE)
        parts = (slice(start, start + ROWS_AT_ONCE) for start in starts)
        return torch.cat([self._adjust_and_draw(logits[part], rows[part]) for part in parts])

    def _adjust_and_draw(self, logits: Tensor, rows: Rows) -> Tensor:
        logits = logits.float()
        logits = _on_rows(logits, rows, lambda row: row.has_penalties, self._penalize)
        logits = _on_rows(logits, rows, lambda row: bool(row.params.logit_bias), _add_bias)
        logits = _on_rows(logits, rows, lambda row: row.must_go_on, _bar_end_tokens)
        logits = _on_rows(
            logits, rows, lambda row: row.sequence.guide is not None, _keep_to_grammar
        )
        token_ids = draw_tokens(logits, draws_of(rows, logits))
        self._count(token_ids, rows)
        return token_ids

    def _penalize(self, logits: Tensor, rows: Rows) -> Tensor:
        present, output = self._counts.of([row.sequence for row in rows], logits)
        repetition = _column([row.params.repetition_penalty for row in rows], logits)
        presence = _column([row.params.presence_penalty for row in rows], logits)
        frequency = _column([row.params.frequency_penalty for row in rows], logits)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(present, repeated, logits)
        return logits - frequency * output - presence * (output > 0)

    def _count(self, token_ids: Tensor, rows: Rows) -> None:
        counted = [index for index, row in enumerate(rows) if row.has_penalties]
        sequences = [rows[index].sequence for index in counted]
        self._counts.add(sequences, token_ids[to_device(counted, token_ids.device)])


def _on_rows(
    logits: Tensor,
    rows: Rows,
    applies: Callable[[Row], bool],
    transform: Callable[[Tensor, Rows], Tensor],
) -> Tensor:
    """The logits [B, V], with transform(logits, rows) in place of the rows to which it applies."""
    selected = [index for index, row in enumerate(rows) if applies(row)]
    if not selected:
        return logits
    index = to_device(selected, logits.device)
    changed = transform(logits[index], [rows[i] for i in selected])
    return logits.index_copy(0, index, changed)


def _add_bias(logits: Tensor, rows: Rows) -> Tensor:
    biases = [(i, *bias) for i, row in enumerate(rows) for bias in row.params.logit_bias.items()]
    indices, tokens, values = zip(*biases, strict=True)
    where = (to_device(indices, logits.device), to_device(tokens, logits.device))
    return logits.index_put(where, to_device(values, logits.device, logits.dtype), accumulate=True)


def _bar_end_tokens(logits: Tensor, rows: Rows) -> Tensor:
    barred = [(i, token) for i, row in enumerate(rows) for token in row.sequence.end_token_ids]
    indices, tokens = zip(*barred, strict=True)
    where = (to_device(indices, logits.device), to_device(tokens, logits.device))
    return logits.index_put(where, logits.new_full((), -math.inf))


def _keep_to_grammar(logits: Tensor, rows: Rows) -> Tensor:
    """Bar what the rows' grammars do not allow. The host works this out while a GPU still computes
    the logits."""
    masks = numpy.stack([row.sequence.guide.mask() for row in rows if row.sequence.guide])
    packed = to_device(masks, logits.device, torch.uint8)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill(allowed == 0, -math.inf)


def draws_of(rows: Rows, logits: Tensor) -> Tensor:
    """How the rows' tokens are drawn from logits [B, V]: a `DRAW` each, in one upload."""
    seeds = numpy.array([row.sequence.seed for row in rows], numpy.int64)
    positions = numpy.array([row.num_tokens for row in rows], numpy.uint64)
    noise = uniform(seeds.view(numpy.uint64), positions).tolist()
    params, vocab_size = [row.params for row in rows], logits.shape[1]
    draws = [
        (x, p.top_p, p.min_p, p.temperature, min(p.top_k, vocab_size))
        for x, p in zip(noise, params, strict=True)
    ]
    return to_device(pack_draws(draws), logits.device, torch.uint8)


def uniform(
    seeds: NDArray[numpy.uint64], positions: NDArray[numpy.uint64]
) -> NDArray[numpy.float64]:
    """In [0, 1), of pairs [B]: SplitMix64 (Steele, Lea, Flood 2014) as a hash, twice."""
    bits = _mix(_mix(seeds) + positions * _GOLDEN_RATIO)
    noise: NDArray[numpy.float64] = (bits >> numpy.uint64(12)) * 2.0**-52
    return noise


def _mix(x: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    """The finalizer of SplitMix64, whose products wrap."""
    x = x + _GOLDEN_RATIO
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    x = x ^ (x >> numpy.uint64(31))
    return x


def _column(values: list[float], like: Tensor) -> Tensor:
    """float32 [B, 1] on the device of `like`: one value per row."""
    return to_device(values, like.device, torch.float32)[:, None]
