"""Grids and codes: none loses more than the one before it, and none leaves its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qserve.formats.grid import ChannelGrid, GroupGrid, WeightGrid, fit_grid
from qserve.formats.layout import GROUP_SCALE_MAX
from qserve.formats.weight import W8Weight
from qserve.quant.clip import search_grid
from qserve.quant.linear import LinearQuantizer
from qserve.quant.recipe import RECIPES
from qserve.quant.rounding import InverseFactor, Moments, damped, error, gptq, propagated


def _problem(seed: int, rows: int = 32, columns: int = 128) -> tuple[Tensor, Tensor]:
    """A weight and a damped second moment of correlated inputs with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    loudness = torch.exp(torch.randn(columns, generator=generator))
    inputs = (torch.randn(200, columns, generator=generator) @ mixing * loudness).double()
    return weight, damped(inputs.T @ inputs, 0.01)


def _rounded(weight: Tensor, moments: Moments, group_size: int, **changes: Any) -> Tensor:
    """The weight that what a recipe packs stands for."""
    quantizer = LinearQuantizer(replace(RECIPES["gptq"], **changes), group_size)
    (packed,) = quantizer.quantize([weight], moments)
    return packed.dequantize()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    group_size=st.sampled_from([-1, 64, 128]),
    common=st.sampled_from([0.02, 0.1, 1.0]),
)
def test_gptq_is_never_worse_than_nearest(seed: int, group_size: int, common: float) -> None:
    """Where inputs have little in common, GPTQ by itself would do worse for some rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 128, generator=generator)
    inputs = torch.randn(2000, 128, generator=generator, dtype=torch.float64)
    inputs += 3 * common * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    moments = Moments(inputs.T @ inputs, None)
    hessian = damped(moments.hessian, RECIPES["gptq"].damping)
    chosen, plain = (
        error(weight, _rounded(weight, moments, group_size, rounding=rounding), hessian)
        for rounding in ("gptq", "nearest")
    )
    assert (chosen <= plain * (1 + 1e-5)).all()
    assert chosen.sum() < (0.99 - 0.3 * common) * plain.sum()


def _textbook_gptq(weight: Tensor, grid: WeightGrid, hessian: Tensor) -> Tensor:
    """Codes u8 [N, K] by the paper's update, one column at a time, its inverse eliminated along."""
    remaining, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for column in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        chosen = grid.quantize(remaining.float())
        codes[:, column] = chosen[:, column]
        lost = remaining[:, column] - grid.dequantize(chosen)[:, column]
        row = inverse[column] / inverse[column, column]
        remaining -= lost[:, None] * row
        inverse = inverse - torch.outer(inverse[:, column], row)
        inverse[column, column] = 1.0
    return codes


@pytest.mark.parametrize("group_size", [-1, 64])
def test_gptq_is_that_of_the_paper(group_size: int) -> None:
    """Over more columns than are rounded at once; a code may differ where float32 sums tie."""
    weight, hessian = _problem(7, rows=64, columns=192)
    grid = fit_grid(weight, group_size)
    codes = gptq(weight, grid, InverseFactor.of(hessian))
    expected = _textbook_gptq(weight, grid, hessian)
    assert (codes != expected).any(dim=1).sum() <= 1
    assert (codes != grid.quantize(weight)).float().mean() > 0.2


def test_inputs_that_never_come_are_rounded_to_nearest() -> None:
    weight, _ = _problem(2)
    moments = Moments(torch.zeros(128, 128, dtype=torch.float64), None)
    grid = fit_grid(weight, 64)
    expected = grid.dequantize(grid.quantize(weight))
    assert torch.equal(_rounded(weight, moments, 64), expected)


def test_gptq_without_correlation_is_rounding_to_nearest() -> None:
    weight, _ = _problem(0)
    grid = fit_grid(weight, 64)
    hessian = torch.diag(torch.rand(128, dtype=torch.float64) + 0.1)
    assert torch.equal(gptq(weight, grid, InverseFactor.of(hessian)), grid.quantize(weight))


def test_gptq_of_two_columns_is_the_best_there_is() -> None:
    """Two columns carry everything: with the other codes fixed, all 256 pairs are tried."""
    weight, _ = _problem(3, rows=8, columns=64)
    hessian = torch.eye(64, dtype=torch.float64) * 1e-3
    hessian[:2, :2] = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
    grid = ChannelGrid.fit(weight)
    codes = gptq(weight, grid, InverseFactor.of(hessian))
    found = error(weight, grid.dequantize(codes), hessian)
    best = torch.full_like(found, torch.inf)
    for first in range(16):
        for second in range(16):
            trial = grid.quantize(weight)
            trial[:, 0], trial[:, 1] = first, second
            best = torch.minimum(best, error(weight, grid.dequantize(trial), hessian))
    assert (found <= 1.5 * best + 1e-9).all() and torch.isclose(found, best).any()


def test_full_propagation_is_least_squares() -> None:
    weight, _ = _problem(1)
    exact = torch.randn(400, 128, dtype=torch.float64)
    served = exact + 0.3 * torch.randn(400, 128, dtype=torch.float64)
    moments = Moments.of([(exact, served, None)])
    inverse = InverseFactor.of(moments.hessian)
    assert moments.cross is not None
    fitted = propagated(weight.double(), moments.cross, inverse, 1.0)
    expected = torch.linalg.lstsq(served, exact @ weight.double().T).solution.T
    assert torch.allclose(fitted, expected, atol=1e-8)
    halfway = propagated(weight.double(), moments.cross, inverse, 0.5)
    assert torch.allclose(halfway, (weight + expected) / 2, atol=1e-8)


def test_propagation_makes_up_for_what_the_served_inputs_lack() -> None:
    weight, _ = _problem(4)
    exact = torch.randn(400, 128)
    served = exact + 0.3 * torch.randn(400, 128)
    moments = Moments.of([(exact, served, None)])
    errors = [
        (served @ _rounded(weight, moments, 64, propagation=strength).T - exact @ weight.T)
        .square()
        .sum()
        for strength in (0.0, 0.5, 1.0)
    ]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.9 * errors[1]


def test_grids_are_those_of_propagated_weights() -> None:
    """Inputs that arrive at half of their size need weights of twice theirs."""
    weight, _ = _problem(6)
    exact = torch.randn(2000, 128)
    moments = Moments.of([(exact, exact / 2, None)])
    for grid in ("span", "search"):
        rounded = _rounded(weight, moments, 64, propagation=1.0, damping=1e-6, grid=grid)
        assert (rounded - 2 * weight).norm() < 0.15 * (2 * weight).norm()


def test_nearest_is_of_the_bits_that_the_recipe_has() -> None:
    weight = torch.randn(64, 128)
    wide = LinearQuantizer(replace(RECIPES["rtn"], weight_bits=8), 64).nearest(weight)
    assert torch.equal(wide, W8Weight.quantize(weight).dequantize())
    grid = fit_grid(weight, 64)
    narrow = LinearQuantizer(RECIPES["rtn"], 64).nearest(weight)
    assert torch.equal(narrow, grid.dequantize(grid.quantize(weight)))


def test_moments_count_tokens_by_the_residual_they_are_added_to() -> None:
    exact, served, residual = torch.randn(6, 64), torch.randn(6, 64), torch.randn(6, 8)
    halves = (slice(0, 3), slice(3, 6))
    weighted = Moments.of([(exact[half], served[half], residual[half]) for half in halves])
    tokens = torch.diag(8 / residual.square().sum(dim=1))
    assert torch.allclose(weighted.hessian, (served.T @ tokens @ served).double(), atol=1e-4)
    expected = ((exact - served).T @ tokens @ served).double()
    assert weighted.cross is not None and torch.allclose(weighted.cross, expected, atol=1e-4)


@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_searched_grid_loses_no_more_than_the_span(group_size: int) -> None:
    weight = torch.randn(64, 256)
    weight[::7, 3] *= 6
    importance = torch.rand(256) ** 4
    losses = [
        ((grid.dequantize(grid.quantize(weight)) - weight).square() @ importance)
        for grid in (search_grid(weight, group_size, importance), fit_grid(weight, group_size))
    ]
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all()
    assert losses[0].sum() < 0.95 * losses[1].sum()


@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_a_grid_searched_by_output_loses_least_there(group_size: int) -> None:
    weight, hessian = _problem(5, columns=256)
    size = 256 if group_size == -1 else group_size
    metric = hessian.float() / hessian.diagonal().mean().float()
    within = torch.block_diag(*torch.ones(256 // size, size, size)) * metric
    grids = (
        search_grid(weight, group_size, metric),
        search_grid(weight, group_size, metric.diagonal()),
        fit_grid(weight, group_size),
    )
    losses = [error(weight, grid.dequantize(grid.quantize(weight)), within) for grid in grids]
    assert all((losses[0] <= other * (1 + 1e-4)).all() for other in losses[1:])
    assert losses[0].sum() < 0.99 * losses[1].sum()


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda weight: weight,
    "negative": lambda weight: -weight.abs(),
    "positive": lambda weight: weight.abs(),
    "heavy-tailed": lambda weight: weight**3,
}


def _least_losses(level1: Tensor, importance: Tensor) -> Tensor:
    """[N, G]: what groups [N, G, g] lose by the best of all scales and zeros."""
    lowest = torch.full(level1.shape[:-1], torch.inf)
    for scale in range(1, GROUP_SCALE_MAX + 1):
        for zero in range(min(16, 128 // scale + 1)):
            top = min(15, (127 + zero * scale) // scale)
            codes = torch.round(level1 / scale + zero).clamp(0, top)
            loss = (((codes - zero) * scale - level1).square() * importance).sum(dim=-1)
            lowest = torch.minimum(lowest, loss)
    return lowest


@pytest.mark.parametrize("shape", SHAPES)
def test_searched_groups_are_near_the_best_there_are_and_stay_within_eight_bits(shape: str) -> None:
    weight, importance = SHAPES[shape](torch.randn(64, 256)), torch.rand(256) ** 4
    grid = search_grid(weight, 64, importance)
    assert isinstance(grid, GroupGrid)
    assert int(grid.group_scale.min()) >= 1 and int(grid.group_scale.max()) <= GROUP_SCALE_MAX
    assert int((grid.group_scale.int() * grid.group_zero.int()).max()) <= 128
    packed = grid.pack(grid.quantize(weight))
    assert torch.equal(packed.dequantize(), grid.dequantize(packed.codes()))
    steps = grid.scale.float()[:, None]
    loss = ((packed.dequantize() - weight) / steps).square() @ importance
    groups, weights = (weight / steps).unflatten(1, (-1, 64)), importance.reshape(-1, 64)
    assert loss.sum() < 1.1 * _least_losses(groups, weights).sum()


def test_a_searched_zero_times_its_scale_is_a_byte() -> None:
    """Steps of 10 from -110 to 0, about which a centred zero of 13 would be 130 below."""
    weight, importance = torch.arange(64).remainder(12)[None] * -10.0, torch.ones(64)
    weight[:, :2], importance[:2] = torch.tensor([-119.0, 8.6]), 0.0
    grid = search_grid(weight, 64, importance)
    assert isinstance(grid, GroupGrid) and grid.scale.item() == 1
    assert (grid.group_scale.item(), grid.group_zero.item()) == (10, 12)
    assert torch.equal(grid.dequantize(grid.quantize(weight))[:, 2:], weight[:, 2:])


def test_a_recipe_says_by_which_metric_grids_are_searched() -> None:
    weight, hessian = _problem(5, columns=256)
    moments, groups = Moments(hessian, None), torch.block_diag(*torch.ones(4, 64, 64))
    losses = [
        error(weight, _rounded(weight, moments, 64, rounding="nearest", grid=grid), metric).sum()
        for metric in (hessian * groups, hessian.diagonal().diag())
        for grid in ("output", "search", "span")
    ]
    assert losses[0] < losses[1] and losses[4] < min(losses[3], losses[5])


def test_every_code_a_grid_can_emit_stays_within_eight_bits() -> None:
    """All (q, s2, z): no product, sum or difference of either way to dequantize leaves a byte."""
    scale, zero = torch.meshgrid(
        torch.arange(1, GROUP_SCALE_MAX + 1), torch.arange(16), indexing="ij"
    )
    valid = zero * scale <= 128
    scale, zero = scale[valid], zero[valid]
    grid = GroupGrid(torch.ones(1).half(), scale[None].byte(), zero[None].byte(), 64)
    top = grid.max_code[0].int()
    codes = torch.arange(16)[:, None]
    allowed = codes <= top
    value = (codes - zero) * scale
    assert ((value >= -128) & (value <= 127))[allowed].all()
    assert (codes * scale <= 255)[allowed].all()
    offset = 128 - zero * scale
    fast = ((codes * scale + offset) % 256) ^ 0x80
    assert torch.equal(((fast + 128) % 256 - 128)[allowed], value[allowed])
    assert (((codes * scale + offset) >= 0) & ((codes * scale + offset) <= 255))[allowed].all()
