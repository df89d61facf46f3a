"""Activations with something behind them."""

from __future__ import annotations

from dataclasses import replace

from qserve.formats.activation import QuantizedActivation


def before_poison(x: QuantizedActivation) -> QuantizedActivation:
    """The same, but the room behind the codes is filled with what is no code."""
    tokens, columns = x.codes.shape
    codes = QuantizedActivation.empty(tokens, columns, x.codes.device).codes
    codes.as_strided((codes.untyped_storage().nbytes() // columns, columns), (columns, 1)).fill_(
        -128
    )
    return replace(x, codes=codes.copy_(x.codes))
