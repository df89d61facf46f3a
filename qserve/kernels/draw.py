"""Drawing tokens: every row of logits by its own temperature, filters and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from qserve.kernels.op import FLOAT_DTYPES, Contract

DRAW = numpy.dtype(
    [("noise", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("temperature", "f4"), ("top_k", "i4")]
)
"""How a row's token is drawn; the struct `Draw` of csrc/draw.cu. noise: in [0, 1). temperature: 0 takes
the likeliest token, the first of several, whatever the others say. top_k: 0 is off. top_p: 1 is off.
min_p: least probability, relative to the likeliest token's; 0 is off."""

SHARE_BITS = 30
"""Of the integers that stand for probabilities."""

LARGEST_SHARE = 2**SHARE_BITS - 1

Draws = NDArray[numpy.void]
"""`DRAW`s, [B]."""


def pack_draws(draws: Sequence[tuple[float, ...]]) -> NDArray[numpy.uint8]:
    """The bytes, [B, 32], of the fields of each `DRAW`."""
    return numpy.array(draws, DRAW).view(numpy.uint8).reshape(len(draws), DRAW.itemsize)


def draw_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """Draw a token for each row, by inverting the cumulative distribution of what its filters leave.

    logits: float16, bfloat16 or float32 [B, V]. draws: uint8 [B, 32], a `DRAW` for each row.
    Returns int64 [B]. Of logits that are not numbers, or all minus infinity, any token.

    A token's probability becomes an integer, its share, in units of 2^-30 of the likeliest token's:
    sums do not depend on the order in which a device adds them, and so neither do the filters'
    borders nor the tokens. Devices differ by the last bit of an exponential. The filters come one
    after the other, top_k first; tokens whose share is that of the last one kept all stay.
    """
    contract = Contract("draw_tokens")
    contract.check("logits", logits, ("B", "V"), *FLOAT_DTYPES)
    contract.check("draws", draws, ("B", DRAW.itemsize), torch.uint8)
    contract.require(draws.is_contiguous(), "draws must be contiguous")
    contract.require(logits.shape[1] > 0, "there must be a token to draw")
    if logits.is_cuda:
        from qserve.kernels import draw_cuda

        return draw_cuda.draw_tokens(logits, draws)
    return _reference(logits, draws)


def _reference(logits: Tensor, draws: Tensor) -> Tensor:
    token_ids = logits.argmax(dim=-1)
    settings = draws.numpy().view(DRAW)[:, 0]
    drawn = numpy.flatnonzero(settings["temperature"] > 0)
    if len(drawn):
        token_ids[drawn] = _draw(_rows(logits, drawn).float(), settings[drawn])
    return token_ids


def _draw(logits: Tensor, draws: Draws) -> Tensor:
    shares = _shares(logits, _column(draws["temperature"]))
    _bar(shares, draws, draws["top_k"] > 0, _least_of_top_k)
    _bar(shares, draws, draws["top_p"] < 1, _least_of_top_p)
    _bar(shares, draws, draws["min_p"] > 0, _least_of_min_p)
    cumulative = shares.cumsum(dim=-1, dtype=torch.int64)
    threshold = (_column(draws["noise"]) * cumulative[:, -1:]).long()
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)


def _shares(logits: Tensor, temperature: Tensor) -> Tensor:
    """int32 [B, V]. The largest one lacks a unit, to fit its bits."""
    inverse = (1 / temperature).clamp(max=torch.finfo(torch.float32).max)
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) * inverse).exp()
    shares: Tensor = (weights * 2**SHARE_BITS).round().int()
    return shares.clamp(max=LARGEST_SHARE)


def _bar(
    shares: Tensor,
    draws: Draws,
    applies: NDArray[numpy.bool_],
    least: Callable[[Tensor, Draws], Tensor],
) -> None:
    """Leave nothing, in the rows to which a filter applies, of shares below `least(shares, draws)`."""
    chosen = numpy.flatnonzero(applies)
    if len(chosen):
        own = _rows(shares, chosen)
        shares[chosen] = own.masked_fill(own < least(own, draws[chosen]), 0)


def _least_of_top_k(shares: Tensor, draws: Draws) -> Tensor:
    """The k-th largest share."""
    top_k = _column(draws["top_k"]).long().clamp(max=shares.shape[1])
    return shares.topk(int(top_k.max()), dim=-1).values.gather(1, top_k - 1)


def _least_of_top_p(shares: Tensor, draws: Draws) -> Tensor:
    """The last of the smallest set of largest shares that holds top_p of them all.

    It is found bit by bit, as the largest share that still leaves enough.
    """
    enough = (_column(draws["top_p"]) * shares.sum(dim=-1, keepdim=True)).ceil().long()
    least = torch.zeros_like(enough, dtype=shares.dtype)
    for bit in range(SHARE_BITS - 1, -1, -1):
        candidate = least + 2**bit
        mass = torch.where(shares >= candidate, shares, 0).sum(dim=-1, keepdim=True)
        least = torch.where(mass >= enough, candidate, least)
    return least


def _least_of_min_p(_: Tensor, draws: Draws) -> Tensor:
    least: Tensor = _column(draws["min_p"]) * LARGEST_SHARE
    return least.ceil().int()


def _rows(values: Tensor, chosen: NDArray[numpy.intp]) -> Tensor:
    """`values[chosen]`, without a copy where all are."""
    return values if len(chosen) == len(values) else values[chosen]


def _column(values: NDArray[numpy.generic]) -> Tensor:
    """[B, 1]."""
    return torch.from_numpy(numpy.ascontiguousarray(values))[:, None]
