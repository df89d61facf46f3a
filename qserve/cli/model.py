"""From the MODEL a user names to an engine, by way of a quantized copy where one is wanted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qserve.config import ConfigError, EngineConfig

if TYPE_CHECKING:
    from qserve.engine.engine import Engine
    from qserve.models.source import WeightSource
    from qserve.quant.recipe import GroupSize

DEFAULT_RECIPE = "qoq"
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

console = Console(stderr=True, soft_wrap=True)


def load_engine(model: str, precision: str | None, config: EngineConfig) -> Engine:
    """The engine for a checkpoint as it is, or for an unquantized model.

    The latter runs in `precision` if one is given; else it is quantized, once, into the cache.
    """
    from qserve.engine.engine import Engine

    served = servable(model, precision)
    if precision is not None:
        config = replace(config, dtype=PRECISIONS[precision])
    return Engine.load(served, config)


def servable(model: str, precision: str | None) -> str:
    """The model itself, if it is quantized or to run in a precision; else its quantized copy."""
    from qserve.models.source import open_source

    source = open_source(model)
    if precision is not None and source.quantization:
        raise ConfigError(f"--precision is for unquantized models, and {model} is quantized")
    if precision is None and not source.quantization:
        return str(quantized_copy(model, source))
    return str(Path(model).resolve()) if Path(model).exists() else model


def quantized_copy(model: str, source: WeightSource) -> Path:
    """A checkpoint of the model in the cache, made now if there is none; says which it is."""
    directory = cache_directory() / f"{display_name(model)}-{_fingerprint(source)}"
    if directory.is_dir():
        console.print(f"{model} is not quantized; using its quantized copy in {directory}")
        return directory
    console.print(f"{model} is not quantized; quantizing it once into {directory}")
    quantize_model(source, directory)
    return directory


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qserve"


def display_name(model: str) -> str:
    """A short name of a MODEL: what clients ask for, and part of file names."""
    return Path(model).resolve().name if Path(model).exists() else model.replace("/", "--")


def _fingerprint(source: WeightSource) -> str:
    """Changes with the recipe and any of the model's files: their names, sizes and times."""
    from qserve.quant.recipe import find_recipe

    digest = hashlib.sha256(repr(find_recipe(DEFAULT_RECIPE)).encode())
    for path in _files(source):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _files(source: WeightSource) -> Iterator[Path]:
    from qserve.models.gguf_source import GGUFSource
    from qserve.models.source import DirectorySource

    if isinstance(source, GGUFSource):
        yield source.path
    if isinstance(source, DirectorySource):
        yield from sorted(path for path in source.directory.iterdir() if path.is_file())


def quantize_model(
    source: WeightSource,
    directory: Path,
    recipe: str = DEFAULT_RECIPE,
    group_size: GroupSize = "auto",
    calibration: str | None = None,
    wide_linears: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Quantize on the GPU where there is one; shows progress on stderr.

    wide_linears: patterns as in `Recipe`, besides the recipe's own. seed: of calibration windows.
    """
    import torch

    from qserve.quant.pipeline import quantize
    from qserve.quant.recipe import find_recipe

    _check_replaceable(directory, source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = find_recipe(recipe)
    chosen = replace(chosen, wide_linears=(*chosen.wide_linears, *wide_linears))
    quantize(source, directory, chosen, group_size, calibration, seed, device, console)


def _check_replaceable(directory: Path, source: WeightSource) -> None:
    """Refuse to replace what is no checkpoint of ours, or the very model that is read."""
    if not directory.exists():
        return
    if any(path.resolve().parent == directory.resolve() for path in _files(source)):
        raise ConfigError(f"{directory} holds the model itself; name another directory")
    if not directory.is_dir() or (any(directory.iterdir()) and not _is_ours(directory)):
        raise ConfigError(f"{directory} exists and is not a checkpoint of ours; name another")


def _is_ours(directory: Path) -> bool:
    from qserve.formats.checkpoint import QUANT_METHOD
    from qserve.models.source import DirectorySource

    if not (directory / "config.json").is_file():
        return False
    return (DirectorySource(directory).quantization or {}).get("quant_method") == QUANT_METHOD
