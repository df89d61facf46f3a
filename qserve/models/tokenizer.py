"""The tokenizer of a model directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qserve.models.config import ModelError


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load from a directory or a `.gguf` file; ModelError if it holds none. Never from the network."""
    path = Path(path)
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        return AutoTokenizer.from_pretrained(where[0], local_files_only=True, **where[1])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no tokenizer could be read: {error}") from error
