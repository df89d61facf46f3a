"""The tokenizer of a model directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qserve.models.config import ModelError

_GGUF_SPLITS = {"default", "gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "smollm"}
"""Ways to split text before merging, as GGUF names them, that are known to come out right."""


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load from a model directory; ModelError if it holds none. Never from the network."""
    if not Path(directory).is_dir():  # transformers would take the name for a hub id
        raise ModelError(f"{directory}: no such directory")
    return _load(Path(directory))


def load_gguf_tokenizer(path: Path, split: str) -> PreTrainedTokenizerBase:
    """Load from a GGUF file, whose metadata say how it splits text (`tokenizer.ggml.pre`)."""
    if split not in _GGUF_SPLITS:
        raise ModelError(f"{path}: pre-tokenizer {split!r} is not supported")
    tokenizer = _load(path.parent, gguf_file=path.name)
    if split == "smollm":  # transformers leaves out that digits stand alone
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer


def _load(directory: Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        where = directory / options.get("gguf_file", "")
        raise ModelError(f"{where}: no tokenizer could be read: {error}") from error
