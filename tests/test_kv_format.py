"""Pages of keys and values: their bytes, and what comes back from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.formats.kv import KVFormat, dequantize_blocks, quantize_kv, write_tokens


def test_kv_page_sizes() -> None:
    assert KVFormat(4, 128, 8).block_bytes == 8704
    assert KVFormat(4, 128, 8).bytes_per_token == 8 * 136
    assert KVFormat(16, 64, 3).bytes_per_token == 3 * 2 * 64 * 2


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_codes_are_the_nearest_by_the_stored_scale_and_offset(bits: int) -> None:
    """Also where float16 moves the offset by more than a step."""
    x = torch.randn(200, 64) + 300 * torch.randn(200, 1)
    quantized = quantize_kv(x, bits)
    steps = quantized.scale.float()[:, None] * torch.arange(2**bits)
    every = steps[:, None] + quantized.offset.float()[:, None, None]
    nearest = (every - x[..., None]).abs().amin(dim=-1)
    assert ((quantized.dequantize() - x).abs() <= nearest + 1e-4).all()
    assert ((quantized.offset.float() - x.amin(dim=1)).abs() > quantized.scale / 4).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("extreme", [-1e6, 1e6, 1e9])
def test_kv_beyond_float16_stays_finite(bits: int, extreme: float) -> None:
    x = torch.randn(8, 64)
    x[:, 7] = extreme
    assert quantize_kv(x, bits).dequantize().isfinite().all()


def test_golden_bytes_of_a_kv_page() -> None:
    """Token 21 (g = 2, i = 5) of a head of 128 channels: bytes worked out from the layout."""
    kv_format = KVFormat(4, 128, 1)
    pool = kv_format.new_pool(1).zero_()
    keys, values = torch.zeros(1, 1, 128), torch.zeros(1, 1, 128)
    keys[0, 0, 45], values[0, 0, 45] = 15.0, 15.0  # scale 1, offset 0
    write_tokens(pool, kv_format, torch.tensor([21]), keys, values)
    block = pool[0, 0]
    written = block[:8192].nonzero().flatten().tolist()
    # K: t = 1, p = 1, j = 5: byte 2*1024 + 0 + (2*4+1)*16 + (2+1)*4, nibble 6 -> +3, low
    # V: q = 1, gp = 3, sub = 0, hi = 1: byte 4096 + 2*1024 + (3*4+1)*16 + (2+1)*4, nibble 1 -> +0, high
    assert written == [2048 + 144 + 12 + 3, 4096 + 2048 + 208 + 12]
    assert block[written[0]] == 0x0F and block[written[1]] == 0xF0
    assert block[8192 + 21 * 4 : 8192 + 21 * 4 + 4].view(torch.float16).tolist() == [1.0, 0.0]
    assert block[8448 + 21 * 4 : 8448 + 21 * 4 + 4].view(torch.float16).tolist() == [1.0, 0.0]


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from([4, 8, 16]),
    dim=st.sampled_from([64, 128]),
    seed=st.integers(0, 2**31),
    count=st.integers(1, 128),
)
def test_tokens_read_back_from_any_slot(bits: int, dim: int, seed: int, count: int) -> None:
    torch.manual_seed(seed)
    kv_format = KVFormat(bits, dim, 2)
    pool = torch.randint(0, 256, (2, 2, kv_format.block_bytes), dtype=torch.uint8)
    before = pool.clone()
    slots = torch.randperm(128)[:count]
    keys, values = torch.randn(2, count, 2, dim).half().float()
    write_tokens(pool, kv_format, slots, keys, values)
    expected = (keys, values)
    if bits < 16:
        expected = tuple(quantize_kv(x, bits).dequantize() for x in expected)
    for read, original, wanted in zip(
        dequantize_blocks(pool, kv_format),
        dequantize_blocks(before, kv_format),
        expected,
        strict=True,
    ):
        tokens, untouched = (
            read.transpose(1, 2).flatten(0, 1),
            original.transpose(1, 2).flatten(0, 1),
        )
        torch.testing.assert_close(tokens[slots].float(), wanted, rtol=1e-6, atol=1e-6)
        others = torch.ones(128, dtype=torch.bool).index_fill(0, slots, False)
        assert torch.equal(tokens[others].nan_to_num(), untouched[others].nan_to_num())
