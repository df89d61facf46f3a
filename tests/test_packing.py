"""The GPU's weight layout on the CPU: every code and level-2 scale is where the kernels look for it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from qserve.formats import layout
from qserve.formats.grid import fit_grid
from qserve.formats.weight import W4Weight, W8Weight
from qserve.kernels import OpError
from qserve.kernels.gemm_cuda import pack_blocks

ROWS, COLUMNS = 192, 320
n = torch.arange(256)[:, None]
k = torch.arange(384)[None]
SLAB = (n // 128, k // 128, n // 64 % 2)
THREAD = 32 * (n // 16 % 4) + 4 * (n % 8) + k // 4 % 4
BYTE = THREAD * 16 + (2 * (k // 16 % 2) + n // 8 % 2) * 4 + k % 4
STEP = (k // 32 % 2).expand(256, 384)


def padded(codes: torch.Tensor) -> torch.Tensor:
    return pad(codes, (0, 384 - COLUMNS, 0, 256 - ROWS))


def make_weight(group_size: int) -> W4Weight:
    grid = fit_grid(torch.randn(ROWS, COLUMNS), group_size)
    return grid.pack(grid.quantize(torch.randn(ROWS, COLUMNS)))


@pytest.mark.parametrize("group_size", [-1, 64])
def test_four_bit_codes(group_size: int) -> None:
    weight = make_weight(group_size)
    byte = pack_blocks(weight)[(*SLAB, k // 64 % 2 * 2048 + BYTE)]
    assert torch.equal(torch.where(STEP == 1, byte >> 4, byte & 15), padded(weight.codes()))


def test_eight_bit_codes() -> None:
    weight = W8Weight.quantize(torch.randn(ROWS, COLUMNS))
    byte = pack_blocks(weight)[(*SLAB, (k // 64 % 2 * 2 + STEP) * 2048 + BYTE)]
    assert torch.equal(byte.view(torch.int8), padded(weight.weight))


def test_group_scales_and_offsets() -> None:
    weight = make_weight(64)
    assert weight.s2_scales is not None and weight.s2_zeros is not None
    column = torch.arange(0, COLUMNS, 64)[None]
    row = torch.arange(ROWS)[:, None]
    word = 4096 + column // 64 % 2 * 128 + (row // 16 % 4 * 8 + row % 8) * 4 + row // 8 % 2 * 2
    packed = pack_blocks(weight)
    slab = (row // 128, column // 128, row // 64 % 2)
    scales = layout.unpack_group_scales(weight.s2_scales)
    zeros = layout.unpack_group_scales(weight.s2_zeros)
    assert torch.equal(packed[(*slab, word)].view(torch.int8), scales)
    assert torch.equal(packed[(*slab, word + 1)].int(), 128 + zeros.int())


def test_a_weight_beyond_eight_bits_is_refused() -> None:
    weight = make_weight(64)
    assert weight.s2_scales is not None
    wild = W4Weight(weight.qweight, weight.s1_scales, None, weight.s2_scales * 3, weight.s2_zeros)
    with pytest.raises(OpError, match="beyond 8 bits"):
        pack_blocks(wild)
