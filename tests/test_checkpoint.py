"""What config.json says of a checkpoint, and the writer that never leaves half of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qserve.formats.checkpoint import CheckpointWriter, QuantizationConfig
from qserve.formats.weight import FormatError


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig(group_size=64, k_hadamard=True, recipe="qoq"),
        QuantizationConfig(weight_bits=8, kv_bits=8),
        QuantizationConfig(group_size=128, activation_bits=16, kv_bits=16),
    ],
)
def test_config_survives_json(config: QuantizationConfig) -> None:
    assert QuantizationConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_config_speaks_the_language_of_other_engines() -> None:
    values = QuantizationConfig(group_size=128).to_json()
    assert (values["quant_method"], values["wbits"], values["group_size"]) == ("qoq", 4, 128)


def test_config_of_a_published_checkpoint_is_read() -> None:
    published = {"quant_method": "qoq", "wbits": 4, "group_size": 128}
    assert QuantizationConfig.from_json(published) == QuantizationConfig(group_size=128)


def _with(outer: dict[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
    values = {**QuantizationConfig().to_json(), **outer}
    return {**values, "qserve": {**values["qserve"], **inner}}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (_with({"quant_method": "awq"}, {}), "'awq'"),
        (_with({"wbits": 3}, {}), "weight_bits 3"),
        (_with({"group_size": 32}, {}), "group_size 32"),
        (_with({}, {"version": 2}), "version 2"),
        (_with({}, {"kv_bits": 5}), "kv_bits 5"),
        (_with({}, {"k_hadamard": 1}), "k_hadamard 1"),
        (_with({}, {"colour": "blue"}), "'colour'"),
        (_with({}, {"group_size": 64}), "'group_size'"),
    ],
)
def test_config_refuses_what_it_does_not_know(values: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        QuantizationConfig.from_json(values)


def _read(directory: Path) -> dict[str, torch.Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for name, file_name in index["weight_map"].items():
        with safe_open(directory / file_name, framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def test_nothing_is_seen_before_commit_and_all_after(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    writer = CheckpointWriter(directory, "a")
    writer.write("model-0", {"x": torch.arange(3)})
    writer.write("model-1", {"y": torch.ones(2)})
    writer.save_state(2, {"streams": torch.ones(9)})
    assert not directory.exists()
    writer.commit({"kind": "test"})
    assert json.loads((directory / "config.json").read_text()) == {"kind": "test"}
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1  # all for the same users
    tensors = _read(directory)
    assert tensors.keys() == {"x", "y"} and torch.equal(tensors["x"], torch.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shards = {"model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in directory.iterdir()} == {*shards, "config.json"}


def test_commit_replaces_the_old_checkpoint_whole(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    for value in (1, 2):
        writer = CheckpointWriter(directory, str(value))
        writer.write(f"model-{value}", {"x": torch.tensor([value])})
        writer.commit({})
    assert torch.equal(_read(directory)["x"], torch.tensor([2]))
    assert not (directory / "model-1.safetensors").exists()


def test_a_checkpoint_behind_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for value in (1, 2):
        writer = CheckpointWriter(tmp_path / "link", str(value))
        writer.write("model-0", {"x": torch.tensor([value])})
        writer.commit({})
    assert torch.equal(_read(tmp_path / "real")["x"], torch.tensor([2]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_present_directory_may_become_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    writer = CheckpointWriter(Path("."), "a")
    writer.write("model-0", {"x": torch.ones(1)})
    writer.commit({})
    assert torch.equal(_read(tmp_path / "model")["x"], torch.ones(1))


def test_what_an_earlier_kill_left_beside_the_checkpoint_is_cleared(tmp_path: Path) -> None:
    """A kill after both renames leaves the replaced checkpoint behind."""
    directory = tmp_path / "model"
    for value in (1, 2):
        writer = CheckpointWriter(directory, str(value))
        writer.write("model-0", {"x": torch.tensor([value])})
        (tmp_path / ".model.replaced").mkdir()
        (tmp_path / ".model.replaced" / "config.json").write_text("{}")
        writer.commit({})
    assert torch.equal(_read(directory)["x"], torch.tensor([2]))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_write_leaves_the_old_checkpoint_and_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model"
    writer = CheckpointWriter(directory, "old")
    writer.write("model-0", {"x": torch.zeros(1)})
    writer.commit({})

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    writer = CheckpointWriter(directory, "new")
    monkeypatch.setattr("qserve.formats.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        writer.write("model-0", {"x": torch.ones(1)})
    assert not writer.has("model-0")
    assert torch.equal(_read(directory)["x"], torch.zeros(1))


def test_work_is_found_again_by_its_fingerprint_only(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    first = CheckpointWriter(directory, "a")
    first.write("model-0", {"x": torch.ones(1)})
    first.save_state(1, {"streams": torch.arange(4)})
    again = CheckpointWriter(directory, "a")
    done, state = again.load_state()
    assert again.has("model-0") and done == 1 and torch.equal(state["streams"], torch.arange(4))
    other = CheckpointWriter(directory, "b")
    assert not other.has("model-0") and other.load_state() == (0, {})


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    writer = CheckpointWriter(directory, "old")
    writer.write("model-0", {"x": torch.zeros(1)})
    writer.commit({})
    directory.rename(tmp_path / ".model.replaced")
    CheckpointWriter(directory, "new")
    assert torch.equal(_read(directory)["x"], torch.zeros(1))
