"""Arguments and options that commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

API_KEY_VARIABLE = "QSERVE_API_KEY"
"""A key that `serve` asks clients for, and that `chat` shows a server."""

Model = Annotated[
    str,
    typer.Argument(help="A directory, a hub id, a .gguf file or smollm2-135m.", show_default=False),
]
Precision = Annotated[
    Literal["fp16", "bf16", "fp32"] | None,
    typer.Option(help="Run an unquantized model as it is, instead of quantizing it."),
]
KVBits = Annotated[
    Literal["4", "8", "16"] | None,
    typer.Option("--kv", help="Bits of the KV cache, instead of the checkpoint's own."),
]


def bits_of(kv: str | None) -> int | None:
    return None if kv is None else int(kv)
