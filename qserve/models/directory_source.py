"""A Hugging Face model directory as a source: safetensors or state dicts, read one tensor at a time."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qserve.models.config import ModelError, first_line, token_ids
from qserve.models.tokenizer import load_tokenizer
from qserve.models.weight_source import WeightSource

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


class TensorFile(Protocol):
    """One file of tensors."""

    def names(self) -> set[str]:
        """Names of its tensors."""

    def tensor(self, name: str) -> Tensor:
        """One of its tensors."""


class SafetensorsFile:
    """A `.safetensors` file, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a safetensors file: {first_line(error)}") from error

    def names(self) -> set[str]:
        return set(self._file.keys())

    def tensor(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self._path}: {name}: {first_line(error)}") from error
        return tensor


class StateDictFile:
    """A `.bin` or `.pt` state dict: weights only, never arbitrary pickles; mapped."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise ModelError(f"{path}: not a state dict of tensors: {first_line(error)}") from error
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ModelError(f"{path}: not a state dict of tensors")
        self._state: dict[str, Tensor] = state

    def names(self) -> set[str]:
        return set(self._state)

    def tensor(self, name: str) -> Tensor:
        return self._state[name]


class DirectorySource(WeightSource):
    """A Hugging Face model directory, its weights in safetensors or, failing that, state dicts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hf_config = _read_json(directory / "config.json")
        self.hf_config["eos_token_id"] = _stop_tokens(self.hf_config, directory)

    def names(self) -> set[str]:
        return set(self._files)

    def tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelError(f"{self.directory}: there is no tensor {name}")
        return self._files[name].tensor(name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.directory)

    def save_tokenizer(self, directory: Path) -> None:
        files = [path for pattern in _TOKENIZER_FILES for path in self.directory.glob(pattern)]
        if not any(path.name.startswith("tokenizer") for path in files):
            raise ModelError(f"{self.directory}: there are no tokenizer files")
        for path in files:
            shutil.copy(path, directory / path.name)

    @cached_property
    def _files(self) -> dict[str, TensorFile]:
        """Which file holds each tensor."""
        located: dict[str, TensorFile] = {}
        for path in _weight_files(self.directory):
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else StateDictFile(path)
            twice = located.keys() & file.names()
            if twice:
                raise ModelError(f"{path}: {min(twice)} is in another file too")
            located |= dict.fromkeys(file.names(), file)
        return located


def _weight_files(directory: Path) -> Sequence[Path]:
    """Safetensors before state dicts; of each, those an index names, else all."""
    for kind, patterns in ((".safetensors", ["*.safetensors"]), (".bin", ["*.bin", "*.pt"])):
        files = sorted(path for pattern in patterns for path in directory.glob(pattern))
        files = [path for path in files if path.name != "training_args.bin"]
        index = next(directory.glob(f"*{kind}.index.json"), None)
        if files:
            return _indexed_files(index) if index else files
    raise ModelError(f"{directory}: there are no .safetensors, .bin or .pt files")


def _indexed_files(index: Path) -> list[Path]:
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    files = [index.with_name(name) for name in names]
    for path in files:
        if not path.is_file():
            raise ModelError(f"{path}: named by {index.name}, but missing")
    return files


def _stop_tokens(hf_config: dict[str, Any], directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    generation = _read_json(path) if path.is_file() else {}
    stops = (token_ids(values.get("eos_token_id")) for values in (hf_config, generation))
    return list(dict.fromkeys(token for tokens in stops for token in tokens))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values
