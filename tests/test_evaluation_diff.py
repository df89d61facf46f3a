"""The diff of two models: what is exact shows as exact, and damage shows where it was done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qserve.config import EngineConfig
from qserve.evaluation.basis import BasisError, read_weights, stream_rotation
from qserve.evaluation.diff import ModelDiff, Tally, diff_models
from qserve.evaluation.sequences import EvaluatedModel
from qserve.models import names
from qserve.models.source import WeightSource, open_source
from qserve.quant.calibrate import read_layer
from qserve.quant.hadamard import hadamard
from qserve.quant.pipeline import quantize
from qserve.quant.recipe import Recipe, find_recipe
from qserve.quant.rotate import RotatedSource, rotate_values
from qserve.testing.tiny import (
    MemorySource,
    quantized_source,
    tiny_config,
    tiny_hf_model,
    tiny_source,
    tiny_tensors,
)

EXACT_DB = 50.0
"""Above what 16-bit pages of keys and values lose."""


def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(320, (2, 96), generator=generator).tolist()


def diff(original: WeightSource, other: WeightSource) -> ModelDiff:
    models = (EvaluatedModel.open(source, EngineConfig()) for source in (original, other))
    return diff_models(*models, windows())


def changed(source: MemorySource, name: str, change: Callable[[Tensor], Tensor]) -> MemorySource:
    tensors = {**source.tensors, name: change(source.tensors[name])}
    return MemorySource(source.hf_config, tensors)


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return tiny_source()


def test_a_model_equals_itself(source: MemorySource) -> None:
    result = diff(source, source)
    assert (result.kl_divergence, result.top1_agreement, result.tokens) == (0, 1, 192)
    assert not result.rotated and len(result.layers) == 2
    for layer in result.layers:
        for agreement in (*layer.weights.values(), layer.attention, layer.mlp, layer.output):
            assert agreement.sqnr_db > 110 and agreement.cosine == pytest.approx(1)
        assert layer.attention.sqnr_db == layer.mlp.sqnr_db == layer.output.sqnr_db == 300


@pytest.mark.parametrize("part", ["mlp.up_proj", "self_attn.k_proj", "self_attn.v_proj"])
def test_rows_of_zeros_have_no_scale_to_find(source: MemorySource, part: str) -> None:
    def without_rows(weight: Tensor) -> Tensor:
        return weight.clone().index_fill_(0, torch.tensor([3, 40]), 0.0)

    pruned = changed(source, f"model.layers.1.{part}.weight", without_rows)
    first, second = diff(pruned, pruned).layers
    for agreement in (*first.weights.values(), *second.weights.values()):
        assert agreement.sqnr_db > 110


def transformed(source: MemorySource) -> MemorySource:
    """All that is ever folded into weights: rotations, an order, scales. Computes what it did."""
    rotated, config = RotatedSource(source), source.config
    tensors = {
        name: rotated.tensor(name).float() for name in rotated.names() if ".layers." not in name
    }
    generator = torch.Generator().manual_seed(2)
    for index in range(config.num_layers):
        layer = rotate_values(read_layer(rotated, index), config)
        channels = 0.3 + torch.rand(config.intermediate_size, generator=generator)
        values = 0.3 + torch.rand(config.num_kv_heads, config.head_dim, generator=generator)
        of_heads = values.repeat_interleave(config.num_heads // config.num_kv_heads, dim=0)
        order = torch.randperm(config.intermediate_size, generator=generator)
        pairs = 0.3 + torch.rand(config.num_kv_heads, config.head_dim // 2, generator=generator)
        keys = pairs.repeat(1, 2)
        queries = keys.repeat_interleave(config.num_heads // config.num_kv_heads, dim=0)
        layer["self_attn.q_proj.weight"] /= queries.flatten()[:, None]
        layer["self_attn.k_proj.weight"] *= keys.flatten()[:, None]
        layer["self_attn.v_proj.weight"] *= values.flatten()[:, None]
        layer["self_attn.o_proj.weight"] /= of_heads.flatten()
        layer["mlp.up_proj.weight"] *= channels[:, None]
        layer["mlp.down_proj.weight"] /= channels
        for part in names.GATE_UP:
            layer[f"{part}.weight"] = layer[f"{part}.weight"][order]
        layer["mlp.down_proj.weight"] = layer["mlp.down_proj.weight"][:, order]
        prefix = names.layer_prefix(index)
        tensors |= {prefix + name: tensor for name, tensor in layer.items()}
    return MemorySource({**rotated.hf_config}, tensors)


def test_what_is_folded_away_is_no_difference(source: MemorySource) -> None:
    result = diff(source, transformed(source))
    assert result.rotated and result.kl_divergence < 1e-5 and result.top1_agreement > 0.99
    for layer in result.layers:
        assert min(agreement.sqnr_db for agreement in layer.weights.values()) > 90
        for agreement in (layer.attention, layer.mlp, layer.output):
            assert agreement.sqnr_db > EXACT_DB and agreement.cosine > 0.9999


@pytest.mark.parametrize("group_size", [64, -1])
def test_weights_of_plain_rounding(source: MemorySource, group_size: int) -> None:
    """Equal to the ratio computed directly, but for what a fitted scale takes up."""
    rounded = quantized_source(source, lambda linear: 4, group_size)
    rounded.hf_config = {**source.hf_config}
    result = diff(source, rounded)
    for index, layer in enumerate(result.layers):
        exact, stored = (
            read_weights(each, index, torch.device("cpu")) for each in (source, rounded)
        )
        for part, agreement in layer.weights.items():
            noise = (stored[part] - exact[part]).square().sum() / exact[part].square().sum()
            expected = -10 * float(noise.log10())
            assert agreement.sqnr_db == pytest.approx(expected, abs=0.3), part
            assert agreement.cosine == pytest.approx(1 - float(noise) / 2, abs=2e-3)


@pytest.mark.parametrize("recipe", ["qoq", "qoq-paper-group", "smoothquant", "awq"])
def test_every_recipe_is_compared_in_its_basis(
    source: MemorySource, recipe: str, tmp_path: Path
) -> None:
    short: Recipe = replace(find_recipe(recipe), sequences=4, length=64)
    (tmp_path / "text").write_text("Some text to calibrate with, and not much of it. " * 20)
    quantize(source, tmp_path / "model", short, calibration=str(tmp_path / "text"))
    result = diff(source, open_source(str(tmp_path / "model")))
    for layer in result.layers:
        for part, agreement in layer.weights.items():
            assert agreement.sqnr_db > 13 and agreement.cosine > 0.97, part
        assert min(layer.attention.sqnr_db, layer.mlp.sqnr_db) > 5
        assert 4 < layer.output.sqnr_db < 60
    assert 1e-4 < result.kl_divergence < 0.5 and 0.2 < result.top1_agreement < 1


def test_damage_shows_where_it_was_done(source: MemorySource) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    result = diff(source, changed(source, name, torch.zeros_like))
    first, second = result.layers
    assert first.weights["self_attn.o_proj"].sqnr_db == pytest.approx(0)
    assert first.attention.sqnr_db == pytest.approx(0, abs=1e-3)
    assert first.mlp.sqnr_db < 20 and first.output.sqnr_db < 20
    others = [v.sqnr_db for part, v in first.weights.items() if part != "self_attn.o_proj"]
    assert min(others) > 90
    # The second layer is sound: only the stream that reaches it is not.
    assert second.attention.sqnr_db == second.mlp.sqnr_db == 300
    assert second.output.sqnr_db < 20


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ("self_attn.k_proj", "self_attn.q_proj"),
        ("mlp.up_proj", "mlp.down_proj"),
    ],
)
def test_a_scale_that_is_not_undone_shows(source: MemorySource, part: str, shown: str) -> None:
    damaged = changed(source, f"model.layers.1.{part}.weight", lambda weight: 2 * weight)
    first, second = diff(source, damaged).layers
    assert second.weights[shown].sqnr_db == pytest.approx(0, abs=1e-3)
    assert second.weights[part].sqnr_db > 90
    assert first.weights[shown].sqnr_db > 90 and first.attention.sqnr_db == 300


def test_divergence_of_logits_is_that_of_hugging_face(source: MemorySource) -> None:
    other = changed(source, "lm_head.weight", lambda weight: weight + 0.2 * weight.roll(1, 0))
    result = diff(source, other)
    tokens = torch.tensor(windows())
    with torch.no_grad():
        first, second = (
            tiny_hf_model(each)(tokens).logits.double().log_softmax(-1) for each in (source, other)
        )
    expected = float((first.exp() * (first - second)).sum(-1).mean())
    assert result.kl_divergence == pytest.approx(expected, rel=1e-2)
    agreed = float((first.argmax(-1) == second.argmax(-1)).double().mean())
    assert result.top1_agreement == pytest.approx(agreed, abs=1.5 / 192)
    assert agreed < 1


def test_signal_to_noise_is_a_mean_over_tokens() -> None:
    """One loud token must not drown the others."""
    tally = Tally()
    tally.add(torch.tensor([[1000.0, 0.0], [3.0, 4.0]]), torch.tensor([[1000.0, 0.0], [3.0, 3.5]]))
    agreement = tally.agreement()
    assert agreement.sqnr_db == pytest.approx(10 * torch.log10(torch.tensor(200.0)).item())
    assert agreement.cosine == pytest.approx((1 + 23 / (5 * 21.25**0.5)) / 2)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_no_agreement(broken: float) -> None:
    tally = Tally()
    tally.add(torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0], [1.0, broken, 1.0]]))
    assert not math.isfinite(tally.agreement().sqnr_db)
    assert not tally.agreement().cosine > 0.6


def test_rotation_of_the_stream_is_found() -> None:
    embedding = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    rotation = hadamard(128).float()
    found = stream_rotation(embedding, (embedding @ rotation).half())
    assert found is not None and torch.equal(found, rotation)
    assert stream_rotation(embedding, embedding.half()) is None
    foreign = torch.linalg.qr(torch.randn(128, 128))[0]
    found = stream_rotation(embedding, (embedding @ foreign).half())
    assert found is not None and torch.allclose(found, foreign, atol=1e-4)


def test_windows_longer_than_the_model_are_refused(source: MemorySource) -> None:
    models = [EvaluatedModel.open(source, EngineConfig())] * 2
    assert diff_models(*models, [list(range(256)) * 2]).tokens == 512
    with pytest.raises(ValueError, match="513 tokens exceeds the model's 512 positions"):
        diff_models(*models, [[1, 2], [0] * 513])


def test_models_that_have_nothing_to_do_with_each_other(source: MemorySource) -> None:
    stranger = MemorySource(source.hf_config, tiny_tensors(source.hf_config, seed=1))
    with pytest.raises(BasisError, match="embeddings agree in no basis"):
        diff(source, stranger)
    with pytest.raises(BasisError, match="num_layers is 2 in the one model and 3 in the other"):
        diff(source, tiny_source(tiny_config(num_hidden_layers=3)))
    other_gate = changed(
        source, "model.layers.0.mlp.gate_proj.weight", lambda weight: torch.randn_like(weight)
    )
    with pytest.raises(BasisError, match="rows are not those of the original"):
        diff(source, other_gate)
