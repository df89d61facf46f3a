"""What tests of quantization share: small recipes on short texts, quietly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qserve.models.source import WeightSource
from qserve.quant.pipeline import quantize
from qserve.quant.recipe import Recipe
from qserve.testing.tiny import tiny_config

QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {"sequences": 8, "length": 32}
SMALLEST = tiny_config(
    hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64
)


def quantize_small(
    source: WeightSource,
    directory: Path,
    recipe: Recipe,
    calibration: str | None = __file__,
    **options: Any,
) -> Path:
    """Quantize with a few windows of this file's text; returns the directory."""
    small = replace(recipe, **SMALL)
    quantize(source, directory, small, calibration=calibration, console=QUIET, **options)
    return directory


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Content of each file, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
