"""A block of GPTQ's columns: the kernel, on a CPU and on a GPU, against the reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emulator import Emulator
from torch import Tensor

from qserve.kernels import OpError, jit, round_columns_cuda
from qserve.kernels.jit import Kernel
from qserve.kernels.round_columns import BLOCK_COLUMNS, round_columns


def _problem(rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    """block, step, zero, top, factor; the factor mixes columns strongly."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCK_COLUMNS, rows)
    block = torch.randn(shape, generator=generator)
    step = torch.rand(shape, generator=generator) / 4 + 0.05
    zero = torch.randint(0, 16, shape, generator=generator).float()
    top = torch.randint(12, 16, shape, generator=generator).float()
    factor = torch.randn(BLOCK_COLUMNS, BLOCK_COLUMNS, generator=generator).triu(1) / 4
    return block, step, zero, top, factor + torch.diag(torch.full((BLOCK_COLUMNS,), 0.7))


def _assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Rows in which no value fell on the other side of a tie, which are nearly all, agree."""
    codes, errors = (tensor.cpu() for tensor in found)
    same = (codes == expected[0]).all(dim=0)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(errors[:, same], expected[1][:, same], rtol=1e-3, atol=1e-4)


def test_every_column_compensates_for_those_before_it() -> None:
    """Codes are the nearest to the weight less the errors behind it, in exact arithmetic."""
    block, step, zero, top, factor = (tensor.double() for tensor in _problem(40))
    codes, errors = round_columns(*(t.float() for t in (block, step, zero, top, factor)))
    values = block - factor.triu(1).T @ errors.double()
    nearest = torch.round(values / step + zero).clamp(min=0).minimum(top)
    assert (nearest == codes).float().mean() > 0.999
    scaled = (values - (codes - zero) * step) / factor.diagonal()[:, None]
    torch.testing.assert_close(errors.double(), scaled, rtol=1e-3, atol=1e-4)
    assert (codes >= 0).all() and (codes <= top).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_emulated_kernel(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = Emulator(tmp_path)
    monkeypatch.setattr(jit, "CSRC", emulator.sources)
    monkeypatch.setattr(Kernel, "__call__", lambda *arguments: emulator.launch(*arguments))
    problem = _problem(rows)
    poisoned = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x).fill_(torch.nan))
    found = round_columns_cuda.round_columns(*problem)
    monkeypatch.undo()
    _assert_same(found, round_columns(*problem))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 300, 28672])
def test_kernel(rows: int) -> None:
    problem = _problem(rows)
    found = round_columns(*(tensor.cuda() for tensor in problem))
    _assert_same(found, round_columns(*problem))


def test_the_contract_names_what_breaks_it() -> None:
    block, step, zero, top, factor = _problem(3)
    with pytest.raises(OpError, match="round_columns: top must have shape"):
        round_columns(block, step, zero, top[:, :2], factor)
