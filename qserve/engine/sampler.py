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
from torch import Tensor

from qserve.engine.request import SamplingParams
from qserve.engine.sequence import Sequence
from qserve.engine.token_counts import TokenCounts
from qserve.engine.transfer import to_device


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
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token, whatever that is."""
        params = self.params
        as_they_are = params.temperature == 0 and not params.logit_bias and not self.has_penalties
        return as_they_are and not self.must_go_on and self.sequence.guide is None


Rows = list[Row]

ROWS_AT_ONCE = 128
"""Rows worked on at a time, which bounds the memory that a step takes."""

SHARE_BITS = 31
"""Of the integers that stand for probabilities, which fit int32: top-p reads them once per bit."""

_GOLDEN_RATIO = -0x61C8864680B583EB  # odd, and its multiples spread evenly over 64 bits


class Sampler:
    """Chooses tokens; keeps on the device what sequences with penalties have been given so far."""

    def __init__(self) -> None:
        self._counts = TokenCounts()

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Rows) -> Tensor:
        """The next token of each row: logits float [B, V] -> int64 [B].

        Order as in SamplingParams. A sequence's tokens must all come from here, in order.
        """
        token_ids = logits.argmax(dim=-1)
        chosen = [index for index, row in enumerate(rows) if not row.is_plain]
        for start in range(0, len(chosen), ROWS_AT_ONCE):
            part = chosen[start : start + ROWS_AT_ONCE]
            index = to_device(part, logits.device)
            token_ids[index] = self._choose(logits[index].float(), [rows[i] for i in part])
        return token_ids

    def _choose(self, logits: Tensor, rows: Rows) -> Tensor:
        logits = _on_rows(logits, logits, rows, lambda row: row.has_penalties, self._penalize)
        logits = _on_rows(logits, logits, rows, lambda row: bool(row.params.logit_bias), _add_bias)
        logits = _on_rows(logits, logits, rows, lambda row: row.must_go_on, _bar_end_tokens)
        logits = _on_rows(
            logits, logits, rows, lambda row: row.sequence.guide is not None, _keep_to_grammar
        )
        token_ids = _on_rows(
            logits.argmax(dim=-1), logits, rows, lambda row: row.params.temperature > 0, _draw
        )
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
    default: Tensor,
    values: Tensor,
    rows: Rows,
    applies: Callable[[Row], bool],
    transform: Callable[[Tensor, Rows], Tensor],
) -> Tensor:
    """`default` [B, ...], with transform(values, rows) in place of the rows to which it applies."""
    selected = [index for index, row in enumerate(rows) if applies(row)]
    if not selected:
        return default
    index = to_device(selected, values.device)
    changed = transform(values[index], [rows[i] for i in selected])
    return default.index_copy(0, index, changed)


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


def _draw(logits: Tensor, rows: Rows) -> Tensor:
    """Draw from what the filters leave, by inverting the cumulative distribution.

    Probabilities become integers, in units of 1 / (2^31 - 1): their sums do not depend on the order
    in which a device adds them, and so neither do the filters' borders nor the tokens.
    """
    temperature = _column([row.params.temperature for row in rows], logits)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    logits = _on_rows(logits, logits, rows, lambda row: row.params.top_k > 0, _keep_top_k)
    shares = (logits.softmax(dim=-1).double() * (2**SHARE_BITS - 1)).round().int()
    shares = _on_rows(shares, shares, rows, lambda row: row.params.top_p < 1, _keep_top_p)
    shares = _on_rows(shares, shares, rows, lambda row: row.params.min_p > 0, _keep_min_p)
    seeds = to_device([row.sequence.seed for row in rows], logits.device)
    positions = to_device([row.num_tokens for row in rows], logits.device)
    cumulative = shares.cumsum(dim=-1, dtype=torch.int64)
    threshold = (uniform(seeds, positions)[:, None] * cumulative[:, -1:]).long()
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)  # of logits that are not numbers, any token


def _keep_top_k(logits: Tensor, rows: Rows) -> Tensor:
    """Bar what is less likely than the k-th likeliest; those as likely as it all stay."""
    top_k = [min(row.params.top_k, logits.shape[1]) for row in rows]
    best = logits.topk(max(top_k), dim=-1).values
    least = best.gather(1, to_device(top_k, logits.device)[:, None] - 1)
    return logits.masked_fill(logits < least, -math.inf)


def _keep_top_p(shares: Tensor, rows: Rows) -> Tensor:
    """Bar what is less likely than the last of the smallest set of likeliest tokens holding top_p.

    That share is found bit by bit, as the largest one that still leaves enough.
    """
    top_p = _column([row.params.top_p for row in rows], shares, torch.float64)
    enough = (top_p * shares.sum(dim=-1, keepdim=True)).ceil().long()
    least = torch.zeros_like(enough, dtype=shares.dtype)
    for bit in range(SHARE_BITS - 1, -1, -1):
        candidate = least + 2**bit
        mass = torch.where(shares >= candidate, shares, 0).sum(dim=-1, keepdim=True)
        least = torch.where(mass >= enough, candidate, least)
    return shares.masked_fill(shares < least, 0)


def _keep_min_p(shares: Tensor, rows: Rows) -> Tensor:
    """Bar what is less than min_p times as likely as the likeliest token."""
    min_p = _column([row.params.min_p for row in rows], shares, torch.float64)
    least = (min_p * shares.amax(dim=-1, keepdim=True)).ceil().int()
    return shares.masked_fill(shares < least, 0)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) from int64 pairs: SplitMix64 (Steele, Lea, Flood 2014) as a hash, twice."""
    bits = _mix(_mix(seeds) + positions * _GOLDEN_RATIO)
    return _shift_right(bits, 12).double() * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 on int64, whose products wrap."""
    x = x + _GOLDEN_RATIO
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Of an unsigned number: the sign does not come along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _column(values: list[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 1] on the device of `like`: one value per row."""
    return to_device(values, like.device, dtype)[:, None]
