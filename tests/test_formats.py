"""Packed weights: inverse maps, golden bytes of hand-computed tiles, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.formats import layout
from qserve.formats.grid import ChannelGrid, GroupGrid, fit_grid
from qserve.formats.kv import KVFormat
from qserve.formats.weight import FormatError, W4Weight, W8Weight

blocks_of_32 = st.integers(1, 5).map(lambda n: 32 * n)


@settings(max_examples=25, deadline=None)
@given(rows=blocks_of_32, columns=blocks_of_32, seed=st.integers(0, 2**31))
def test_weight_codes_round_trip(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(
        0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = layout.pack_weight_codes(codes)
    assert packed.shape == (rows, columns // 2)
    assert torch.equal(layout.unpack_weight_codes(packed), codes)


def test_golden_bytes_of_a_weight_tile() -> None:
    """One code set at a time in a 64 x 64 weight, its byte and nibble worked out by hand."""
    for row, column, byte, nibble in [
        (0, 0, 0, 0),
        (16, 0, 0, 1),  # rows +16 are high nibbles
        (8, 0, 4, 0),  # rows +8 are the second word
        (0, 16, 8, 0),  # columns +16 are the third word
        (1, 0, 64, 0),  # the next row is the lane four further
        (0, 4, 16, 0),  # columns +4 are the next lane
        (31, 31, 7 * 64 + 3 * 16 + 8 + 4 + 3, 1),
        (0, 32, 512, 0),  # the next tile along K
        (32, 0, 1024, 0),  # the next tile along N
    ]:
        codes = torch.zeros(64, 64, dtype=torch.uint8)
        codes[row, column] = 11
        expected = torch.zeros(64 * 32, dtype=torch.uint8)
        expected[byte] = 11 << (4 * nibble)
        packed = layout.pack_weight_codes(codes).view(torch.uint8).flatten()
        assert torch.equal(packed, expected), (row, column)


def test_golden_order_of_level_2_scales() -> None:
    values = torch.arange(64, dtype=torch.int8)[:, None].repeat(1, 2)
    values[:, 1] += 64
    packed = layout.pack_group_scales(values)
    assert packed.shape == (2, 64)
    assert packed[0, :8].tolist() == [0, 8, 16, 24, 1, 9, 17, 25]
    assert packed[0, 32:36].tolist() == [32, 40, 48, 56]
    assert packed[1, :4].tolist() == [64, 72, 80, 88]
    assert torch.equal(layout.unpack_group_scales(packed), values)


def test_golden_per_channel_tensors() -> None:
    weight = torch.zeros(64, 64)
    weight[0, :2] = torch.tensor([-0.5, 1.0])
    grid = ChannelGrid.fit(weight)
    packed = grid.pack(grid.quantize(weight))
    assert packed.s1_scales[0] == pytest.approx(0.1, rel=1e-3)
    assert packed.s1_szeros is not None
    assert packed.s1_szeros[0] == pytest.approx(0.5, rel=1e-3)
    assert packed.codes()[0, :3].tolist() == [0, 15, 5]
    assert packed.zeros()[0] == 5


def test_golden_per_group_tensors() -> None:
    weight = torch.zeros(64, 128)
    weight[0, 0], weight[0, 1], weight[0, 64] = 119.0, -31.0, -119.0
    grid = GroupGrid.fit(weight, 64)
    packed = grid.pack(grid.quantize(weight))
    assert packed.s1_scales[0] == 1.0
    assert packed.s2_scales is not None and packed.s2_zeros is not None
    assert packed.s2_scales[:, 0].tolist() == [10, 8]
    assert packed.s2_zeros[:, 0].tolist() == [-30, -120]
    assert packed.codes()[0, [0, 1, 2, 64, 65]].tolist() == [15, 0, 3, 0, 15]
    assert packed.integers()[0, [0, 1, 2, 64, 65]].tolist() == [120, -30, 0, -120, 0]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    group_size=st.sampled_from([-1, 64, 128]),
    clip=st.sampled_from([1.0, 0.7]),
    heavy=st.booleans(),
)
def test_packing_keeps_the_grid_and_the_nearest_code(
    seed: int, group_size: int, clip: float, heavy: bool
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(64, 256)
    weight = weight**5 if heavy else weight
    grid = fit_grid(weight, group_size, clip)
    codes = grid.quantize(weight)
    packed = grid.pack(codes).validate()
    assert packed.group_size == group_size
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.dequantize(), grid.dequantize(codes))
    largest = torch.full_like(codes, 15).int()
    if isinstance(grid, GroupGrid):
        largest = grid.max_code.int().repeat_interleave(group_size, dim=1)
    for step in (-1, 1):
        moved = (codes.int() + step).clamp(min=0).minimum(largest).to(torch.uint8)
        worse = (grid.dequantize(moved) - weight).abs()
        assert ((grid.dequantize(codes) - weight).abs() <= worse * 1.001 + 1e-6).all()


def test_protective_range_holds_for_every_range_and_code() -> None:
    """No code that any level-1 range admits leaves 8 bits, nor does a byte of the IMAD/XOR trick."""
    limit = layout.PROTECTIVE_RANGE
    low, high = torch.meshgrid(torch.arange(-limit, 1.0), torch.arange(limit + 1.0), indexing="ij")
    ranges = torch.zeros(low.numel(), 192)
    ranges[:, 0], ranges[:, 1] = low.flatten(), high.flatten()
    ranges[:, 64], ranges[:, 128] = -limit, limit  # fixes the level-1 scale at 1
    grid = GroupGrid.fit(ranges, 64)
    assert (grid.scale == 1).all()
    scale, zero = grid.group_scale[:, :1].int(), grid.group_zero[:, :1].int()
    assert scale.max() <= layout.GROUP_SCALE_MAX
    codes = torch.arange(16).expand(len(scale), 16).minimum(grid.max_code[:, :1].int())
    integers = (codes - zero) * scale
    assert integers.min() >= -128 and integers.max() <= 127
    assert (zero * scale).max() <= 128
    shifted = codes * scale + (128 - zero * scale)  # the byte before XOR 0x80
    assert shifted.min() >= 0 and shifted.max() <= 255
    reached = (grid.max_code[:, 0].int() - zero[:, 0]) * scale[:, 0]
    # rounding s2 loses 15 halves at the top, rounding z half a step
    assert (reached >= high.flatten() - 7.5 - scale[:, 0] / 2).all()


@pytest.mark.parametrize("factor", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_small_weights_lose_no_more_than_large_ones(factor: float, group_size: int) -> None:
    """A first layer's norm, folded in, makes rows whose scales are below float16's normal range."""
    weight, losses = torch.randn(64, 128), []
    for scaled in (weight, weight * factor):
        grid = fit_grid(scaled, group_size)
        losses.append((grid.dequantize(grid.quantize(scaled)) - scaled).norm() / scaled.norm())
    assert losses[1] < 1.02 * losses[0]


@pytest.mark.parametrize("factor", [1e-12, 1e9])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_weights_beyond_what_scales_reach_are_packed_as_they_are_rounded(
    factor: float, group_size: int
) -> None:
    weight = torch.randn(64, 128) * factor
    grid = fit_grid(weight, group_size)
    codes = grid.quantize(weight)
    assert torch.equal(grid.pack(codes).dequantize(), grid.dequantize(codes))
    assert grid.dequantize(codes).isfinite().all()


def test_both_orders_of_level_2_scales_are_read() -> None:
    weight = torch.randn(64, 256)
    grid = fit_grid(weight, 128)
    ours = grid.pack(grid.quantize(weight))
    assert ours.s2_scales is not None and ours.s2_zeros is not None
    order = [b * 8 + i + 16 * a for a in range(2) for i in range(8) for b in range(2)]
    assert order[:4] == [0, 8, 1, 9] and order[-2:] == [23, 31]

    def as_deepcompressor(packed: torch.Tensor) -> torch.Tensor:
        natural = layout.unpack_group_scales(packed).T.unflatten(1, (-1, 32))
        return natural[:, :, order].flatten(1)

    theirs = replace(
        ours,
        s2_scales=as_deepcompressor(ours.s2_scales),
        s2_zeros=as_deepcompressor(ours.s2_zeros),
    )
    assert not torch.equal(theirs.integers(), ours.integers())
    assert torch.equal(theirs.in_kernel_order().integers(), ours.integers())
    assert ours.in_kernel_order() is ours
    wild = replace(ours, s2_scales=torch.full_like(ours.s2_scales, 100))
    with pytest.raises(FormatError, match="leave 8 bits in either known order"):
        wild.in_kernel_order()


def test_concatenation_stacks_rows() -> None:
    parts = []
    for rows in (64, 128):
        grid = fit_grid(torch.randn(rows, 128), 64)
        parts.append(grid.pack(torch.randint(0, 16, (rows, 128), dtype=torch.uint8)))
    whole = W4Weight.concatenate(parts).validate()
    assert torch.equal(whole.integers(), torch.cat([part.integers() for part in parts]))
    eights = [W8Weight.quantize(torch.randn(64, 64)) for _ in range(2)]
    assert W8Weight.concatenate(eights).shape == (128, 64)


def test_fractional_zero_points_survive() -> None:
    grid = ChannelGrid.fit(torch.randn(64, 64))
    packed = grid.pack(grid.quantize(torch.randn(64, 64)))
    assert packed.s1_szeros is not None
    assert torch.equal(packed.zeros(), grid.zero.float())
    shifted = replace(packed, s1_szeros=packed.s1_szeros + packed.s1_scales * 0.5)
    assert (shifted.zeros() - grid.zero - 0.5).abs().max() < 0.02


def test_what_does_not_fit_is_refused_by_name() -> None:
    grid = fit_grid(torch.randn(64, 128), 64)
    good = grid.pack(torch.zeros(64, 128, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"layer\.s1_scales: expected torch\.float16"):
        replace(good, s1_scales=good.s1_scales.float()).validate("layer")
    with pytest.raises(FormatError, match=r"layer.s2_zeros: expected .* \[2, 64\]"):
        replace(good, s2_zeros=good.s2_zeros[:1]).validate("layer")
    with pytest.raises(FormatError, match="either s1_szeros or both"):
        replace(good, s2_zeros=None).validate()
    narrow = ChannelGrid.fit(torch.randn(96, 64)).pack(torch.zeros(96, 64, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"layer: sizes \(96, 64\) are not multiples of 64"):
        narrow.validate("layer")
    with pytest.raises(FormatError, match="group size 32"):
        fit_grid(torch.randn(64, 128), 32)
    with pytest.raises(FormatError, match="KV bits must be 4, 8 or 16"):
        KVFormat(3, 64, 1)
    with pytest.raises(FormatError, match="head dim must be 64 or 128"):
        KVFormat(4, 80, 1)


def test_prelude_says_what_layout_says() -> None:
    lines = dict(
        line.removeprefix("constexpr int ").rstrip(";").split(" = ")
        for line in layout.cuda_prelude().splitlines()
    )
    assert lines["PAGE_TOKENS"] == "64" and lines["PROTECTIVE_RANGE"] == "119"
    assert all(str(getattr(layout, name)) == value for name, value in lines.items())
