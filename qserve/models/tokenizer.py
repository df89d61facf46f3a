"""The tokenizer of a model directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qserve.models.config import ModelError

_GGUF_SPLITS = {"default", "gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "smollm"}
"""Ways to split text before merging, as GGUF names them, that are known to come out right."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load from a directory or a `.gguf` file; ModelError if it holds none. Never from the network."""
    path = Path(path)
    try:
        return _from_gguf(path) if path.suffix == ".gguf" else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: no tokenizer could be read: {error}") from error


def _from_gguf(path: Path) -> PreTrainedTokenizerBase:
    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.pre")
    split = "default" if field is None else field.contents()
    if split not in _GGUF_SPLITS:
        raise ModelError(f"{path}: pre-tokenizer {split!r} is not supported")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if split == "smollm":  # transformers leaves out that digits stand alone
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer
