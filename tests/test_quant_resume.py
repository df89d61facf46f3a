"""The same bytes every time, also after a kill, and never half of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quant_helpers
import torch
from quant_helpers import SMALL, SMALLEST, bytes_of, quantize_small
from torch import Tensor

from qserve.formats.checkpoint import CheckpointWriter
from qserve.quant import pipeline
from qserve.quant.calibrate import read_layer
from qserve.quant.layer import LayerQuantizer
from qserve.quant.linear import LinearQuantizer
from qserve.quant.pipeline import plan
from qserve.quant.recipe import RECIPES
from qserve.quant.rotate import RotatedSource
from qserve.testing.tiny import tiny_source


def test_twice_with_one_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        bytes_of(quantize_small(tiny_source(), tmp_path / str(run), RECIPES["qoq"], seed=seed))
        for run, seed in enumerate((1, 1, 2))
    )
    assert first == second
    assert first.keys() == other.keys() and first != other


STEPS: dict[str, tuple[type, str]] = {
    "trial": (pipeline.Job, "_trial_error"),
    "layer": (LayerQuantizer, "quantize"),
    "passes": (LayerQuantizer, "_prepared"),
    "linear": (LinearQuantizer, "quantize"),
    "shard": (CheckpointWriter, "write"),
    "state": (CheckpointWriter, "save_state"),
    "commit": (CheckpointWriter, "commit"),
}


def _count(step: str, patch: pytest.MonkeyPatch, last: float = math.inf) -> list[str]:
    """Note every call of a step from now on; that after `last` of them is interrupted."""
    owner, name = STEPS[step]
    original, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(step)
        return original(*arguments, **options)

    patch.setattr(owner, name, counted)
    return calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, int]]:
    """A checkpoint's bytes, and how often each step was taken to make it."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    with pytest.MonkeyPatch.context() as patch:
        calls = {step: _count(step, patch) for step in STEPS}
        made = bytes_of(quantize_small(tiny_source(SMALLEST), directory, RECIPES["qoq"]))
    return made, {step: len(each) for step, each in calls.items()}


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_and_resumed_gives_the_same_bytes(
    step: str,
    share: float,
    whole: tuple[dict[str, bytes], dict[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, steps = whole
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _count(step, patch, last=int(share * steps[step]))
        quantize_small(tiny_source(SMALLEST), tmp_path / "model", RECIPES["qoq"])
    assert not (tmp_path / "model").exists()
    assert (
        bytes_of(quantize_small(tiny_source(SMALLEST), tmp_path / "model", RECIPES["qoq"]))
        == expected
    )


def test_a_run_goes_on_only_with_what_it_was_begun_with() -> None:
    def fingerprint(
        model_seed: int = 0, group_size: int = 64, seed: int = 0, **changes: Any
    ) -> str:
        recipe = replace(RECIPES["gptq"], **SMALL, **changes)
        return plan(
            tiny_source(SMALLEST, model_seed), recipe, group_size, __file__, seed
        ).fingerprint()

    different = (
        {},
        {"model_seed": 1},
        {"group_size": -1},
        {"seed": 1},
        {"damping": 0.5},
        {"wide_linears": ("mlp.down_proj",)},
    )
    prints = [fingerprint(**changes) for changes in different]
    assert len(set(prints)) == len(different) and prints[0] == fingerprint()


def test_layers_of_a_rotated_model_are_calibrated_in_its_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[Tensor] = []
    monkeypatch.setattr(
        CheckpointWriter, "save_state", lambda _, done, tensors: states.append(tensors["exact"])
    )
    source, recipe = tiny_source(SMALLEST), replace(RECIPES["quarot"], passes=())
    quantize_small(source, tmp_path / "model", recipe)
    job = plan(source, replace(recipe, **SMALL), 64, quant_helpers.__file__)
    batches = job._embed(source)
    for index, state in enumerate(states):
        batches = job._quantizer().run_exact(read_layer(source, index), batches)
        expected = torch.cat(batches) @ RotatedSource(source).rotation.float()
        torch.testing.assert_close(state, expected, rtol=1e-3, atol=1e-3)
    assert len(states) == 2


def test_a_resumed_run_writes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _count("state", patch, last=1)
        quantize_small(tiny_source(SMALLEST), tmp_path / "model", RECIPES["quarot"])
    written = _count("shard", monkeypatch)
    layers = _count("layer", monkeypatch)
    quantize_small(tiny_source(SMALLEST), tmp_path / "model", RECIPES["quarot"])
    assert (len(written), len(layers)) == (1, 1)


@pytest.mark.gpu
def test_on_a_gpu_activations_may_wait_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = bytes_of(
        quantize_small(tiny_source(), tmp_path / "a", RECIPES["qoq"], device="cuda")
    )
    monkeypatch.setattr(pipeline, "_RESIDENT_BYTES", 0)
    waiting = bytes_of(quantize_small(tiny_source(), tmp_path / "b", RECIPES["qoq"], device="cuda"))
    assert waiting == resident


def test_the_old_checkpoint_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = quantize_small(tiny_source(), tmp_path / "model", RECIPES["rtn"])
    before = bytes_of(directory)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("qserve.formats.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        quantize_small(tiny_source(), directory, RECIPES["quarot"])
    assert bytes_of(directory) == before
