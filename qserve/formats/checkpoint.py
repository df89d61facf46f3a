"""Quantized checkpoints on disk: what config.json says of them, and a writer that never leaves half of one.

A checkpoint is a Hugging Face model directory: config.json with `quantization_config`, safetensors
shards with an index, tokenizer files. Linears hold the tensors of `W4Weight` or `W8Weight`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qserve.formats.layout import GROUP_SIZES
from qserve.formats.weight import FormatError

FORMAT_VERSION = 1
QUANT_METHOD = "qoq"
_OUTER_FIELDS = {"weight_bits", "group_size"}
"""What other engines read too: `wbits` and `group_size`, outside of our own key."""


@dataclass(frozen=True)
class QuantizationConfig:
    """What `quantization_config` says.

    weight_bits: 4 or 8, of linears not named otherwise by their tensors. group_size: -1 | 64 | 128.
    activation_bits: 8, or 16 for weights that are to be dequantized. kv_bits: 4, 8 or 16.
    k_hadamard: q and k of each head are rotated after RoPE. k_center: tensors `self_attn.k_center`
    [Hkv, D] are subtracted from k before that. recipe: what made the checkpoint.
    """

    weight_bits: int = 4
    group_size: int = -1
    activation_bits: int = 8
    kv_bits: int = 4
    k_hadamard: bool = False
    k_center: bool = False
    recipe: str = ""

    def __post_init__(self) -> None:
        allowed = {
            "weight_bits": (4, 8),
            "group_size": (-1, *GROUP_SIZES),
            "activation_bits": (8, 16),
            "kv_bits": (4, 8, 16),
            "k_hadamard": (False, True),
            "k_center": (False, True),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values or type(value) is not type(values[0]):
                raise FormatError(f"quantization_config: {name} {value!r} is none of {values}")

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json; its outer keys are those other engines read."""
        own = {"version": FORMAT_VERSION, **asdict(self)}
        wbits, group_size = own.pop("weight_bits"), own.pop("group_size")
        return {
            "quant_method": QUANT_METHOD,
            "wbits": wbits,
            "group_size": group_size,
            "qserve": own,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> QuantizationConfig:
        """Read `quantization_config`; without our own key, that of a published checkpoint."""
        if values.get("quant_method") != QUANT_METHOD:
            raise FormatError(
                f"quantization_config: quant_method {values.get('quant_method')!r} is not "
                f"{QUANT_METHOD!r}"
            )
        own = dict(values.get("qserve", {"version": FORMAT_VERSION}))
        version = own.pop("version", None)
        if version != FORMAT_VERSION:
            raise FormatError(
                f"quantization_config: version {version!r} is unknown, only {FORMAT_VERSION} is known"
            )
        unknown = own.keys() - ({field.name for field in fields(cls)} - _OUTER_FIELDS)
        if unknown:
            raise FormatError(f"quantization_config: unknown key {min(unknown)!r}")
        return cls(
            weight_bits=values.get("wbits", 4), group_size=values.get("group_size", -1), **own
        )


class CheckpointWriter:
    """Writes shards one at a time beside `directory`, which `commit` then replaces.

    Until then what `directory` held stays as it was; what was written is found again by the next
    writer of the same `directory` and `fingerprint`, and dropped by one of another fingerprint.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory.resolve()  # a link stays, what it names is replaced
        self.partial = self.directory.with_name(f".{self.directory.name}.partial")
        self._replaced = self.directory.with_name(f".{self.directory.name}.replaced")
        if self._replaced.exists() and not self.directory.exists():
            self._replaced.rename(self.directory)
        note = self.partial / _FINGERPRINT
        if not note.is_file() or note.read_text() != fingerprint:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            _write_text(note, fingerprint)

    def has(self, shard: str) -> bool:
        """Whether the shard is there already."""
        return self._path(shard).is_file()

    def write(self, shard: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard whole, or not at all."""
        _write_tensors(self._path(shard), tensors, {"format": "pt"})

    def save_state(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what is needed to go on once `done` steps are written."""
        _write_tensors(self.partial / _STATE, tensors, {"done": str(done)})

    def load_state(self) -> tuple[int, dict[str, Tensor]]:
        """What `save_state` was last given, (0, {}) if nothing."""
        path = self.partial / _STATE
        if not path.is_file():
            return 0, {}
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return int(file.metadata()["done"]), tensors

    def commit(self, config: Mapping[str, Any]) -> None:
        """Write the index and config.json, then put the checkpoint in the place of `directory`."""
        _write_text(
            self.partial / "model.safetensors.index.json", json.dumps(self._index(), indent=1)
        )
        _write_text(self.partial / "config.json", json.dumps(dict(config), indent=2))
        for name in (_STATE, _FINGERPRINT):
            (self.partial / name).unlink(missing_ok=True)
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(self._replaced)
        self.partial.rename(self.directory)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _path(self, shard: str) -> Path:
        return self.partial / f"{shard}.safetensors"

    def _index(self) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        total = 0
        for path in sorted(self.partial.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(sorted(file.keys()), path.name)
            total += path.stat().st_size
        return {"metadata": {"total_size": total}, "weight_map": weight_map}


_FINGERPRINT = "fingerprint"
_STATE = "state"


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    unfinished.touch()
    mode = unfinished.stat().st_mode
    save_file(contiguous, unfinished, metadata=metadata)
    unfinished.chmod(mode)  # safetensors lets nobody but the writer read it
    unfinished.replace(path)
