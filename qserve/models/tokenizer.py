"""The tokenizer of a model directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qserve.models.config import ModelError

_GGUF_SPLITS = {"default", "gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "smollm"}
"""Ways to split text before merging, as GGUF names them, that are known to come out right."""

TIKTOKEN_SPLITS = {"llama-bpe", "tekken"}
"""Those of tokenizers in tiktoken's manner."""


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load from a model directory; ModelError if it holds none. Never from the network."""
    if not Path(directory).is_dir():  # transformers would take the name for a hub id
        raise ModelError(f"{directory}: no such directory")
    return _load(directory, directory)


def load_gguf_tokenizer(path: Path, split: str, begins: bool) -> PreTrainedTokenizerBase:
    """Load from a GGUF file, whose metadata say how it splits text (`tokenizer.ggml.pre`).

    begins: whether texts begin with a token that says so.
    """
    if split not in _GGUF_SPLITS:
        raise ModelError(f"{path}: pre-tokenizer {split!r} is not supported")
    with TemporaryDirectory() as alone:  # transformers would mix it with tokenizer files beside it
        (Path(alone) / path.name).symlink_to(path.resolve())
        tokenizer = _load(path, alone, gguf_file=path.name)
    tokenizer.add_bos_token = begins
    if split in TIKTOKEN_SPLITS:  # transformers leaves out that whole words need no merges
        tokenizer.backend_tokenizer.model.ignore_merges = True
    if split == "smollm":  # transformers leaves out that digits stand alone
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer


def _load(origin: str | Path, directory: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:  # those of the tokenizers library are of no other class
        raise ModelError(f"{origin}: no tokenizer could be read: {error}") from error
