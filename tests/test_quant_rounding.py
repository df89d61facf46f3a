"""Grids and codes: none loses more than the one before it, and none leaves its bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qserve.formats.layout import GROUP_SCALE_MAX
from qserve.formats.weight import ChannelGrid, GroupGrid, fit_grid
from qserve.quant.clip import search_grid
from qserve.quant.rounding import InverseFactor, Moments, damped, error, gptq, no_worse, propagated


def _problem(seed: int, rows: int = 32, columns: int = 128) -> tuple[Tensor, Tensor]:
    """A weight and a damped second moment of correlated inputs with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    loudness = torch.exp(torch.randn(columns, generator=generator))
    inputs = (torch.randn(200, columns, generator=generator) @ mixing * loudness).double()
    return weight, damped(inputs.T @ inputs, 0.01)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), group_size=st.sampled_from([-1, 64, 128]))
def test_gptq_is_never_worse_than_nearest(seed: int, group_size: int) -> None:
    weight, hessian = _problem(seed)
    grid = fit_grid(weight, group_size)
    nearest = grid.quantize(weight)
    codes = no_worse(gptq(weight, grid, InverseFactor.of(hessian)), nearest, weight, grid, hessian)
    chosen, plain = (error(weight, grid.dequantize(each), hessian) for each in (codes, nearest))
    assert (chosen <= plain * (1 + 1e-5)).all()
    assert chosen.sum() < 0.8 * plain.sum()


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


def test_moments_count_tokens_by_the_residual_they_are_added_to() -> None:
    x = torch.randn(6, 64)
    residual = torch.full((6, 8), 2.0)
    weighted = Moments.of([(x[:3], x[:3], residual[:3]), (x[3:], x[3:], residual[3:])])
    assert torch.allclose(weighted.hessian, (x.T @ x).double() / 4, atol=1e-5)
    assert weighted.cross is not None and not weighted.cross.any()


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


def test_searched_grid_stays_within_eight_bits() -> None:
    weight = torch.randn(64, 256) * torch.exp(torch.randn(64, 256))
    grid = search_grid(weight, 64, torch.ones(256))
    assert isinstance(grid, GroupGrid)
    assert int(grid.group_scale.min()) >= 1 and int(grid.group_scale.max()) <= GROUP_SCALE_MAX
    assert int((grid.group_scale.int() * grid.group_zero.int()).max()) <= 128
    packed = grid.pack(grid.quantize(weight))
    assert torch.equal(packed.dequantize(), grid.dequantize(packed.codes()))


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
