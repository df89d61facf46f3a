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

GROUP_SIZES: dict[str, Literal["auto", -1, 64, 128]] = {
    "auto": "auto",
    "64": 64,
    "128": 128,
    "-1": -1,
}
GroupSizeOption = Annotated[
    Literal["auto", "64", "128", "-1"], typer.Option(help="Weights per scale; -1: a channel's.")
]
Calibration = Annotated[
    str | None, typer.Option(help="A text file or a hub data set to calibrate with.")
]


def bits_of(kv: str | None) -> int | None:
    return None if kv is None else int(kv)
