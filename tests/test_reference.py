"""The references themselves, against plain formulas in float64 and integers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.formats.activation import quantize_activation
from qserve.formats.grid import fit_grid
from qserve.formats.kv import KVFormat, dequantize_blocks, quantize_kv, write_tokens
from qserve.formats.weight import W4Weight, W8Weight
from qserve.kernels import (
    OpError,
    PagedBatch,
    paged_attention,
    prepare_weight,
    quantize_per_token,
    quantized_linear,
    reference_linear,
    rms_norm,
    rms_norm_quantize,
    rope_append,
    silu_mul,
    silu_mul_quantize,
)
from qserve.kernels.kv_append import apply_hadamard


def make_weight(kind: str, rows: int, columns: int) -> W4Weight | W8Weight:
    weight = torch.randn(rows, columns) * torch.rand(rows, 1)
    if kind == "w8":
        return W8Weight.quantize(weight)
    grid = fit_grid(weight, -1 if kind == "channel" else 64)
    return grid.pack(grid.quantize(weight)).validate()


@pytest.mark.parametrize("kind", ["channel", "group", "w8"])
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 4).map(lambda n: 64 * n),
    columns=st.sampled_from([64, 192, 1024, 1088, 2304]),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_float_chunks_equal_integer_arithmetic(
    kind: str, rows: int, columns: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = make_weight(kind, rows, columns)
    x = quantize_activation(torch.randn(tokens, columns) * 10)
    bias = torch.randn(rows)
    exact = reference_linear(x, weight, bias)
    assert torch.equal(quantized_linear(x, prepare_weight(weight, "cpu"), bias), exact)


def test_linear_stays_exact_at_the_extremes() -> None:
    rows, columns = 64, 4096
    weight = W8Weight(torch.full((rows, columns), -128, dtype=torch.int8), torch.ones(rows))
    x = quantize_activation(torch.ones(2, columns))
    prepared = prepare_weight(weight, "cpu")
    assert torch.equal(quantized_linear(x, prepared), reference_linear(x, weight))
    assert quantized_linear(x, prepared)[0, 0] == pytest.approx(-128 * 4096, rel=1e-6)


@pytest.mark.parametrize("kind", ["channel", "group", "w8"])
def test_linear_is_the_product_of_the_dequantized(kind: str) -> None:
    weight = make_weight(kind, 128, 576)
    x = quantize_activation(torch.randn(7, 576))
    expected = x.dequantize().double() @ weight.dequantize().double().T
    torch.testing.assert_close(reference_linear(x, weight).double(), expected, rtol=1e-4, atol=1e-4)


def test_linear_refuses_what_does_not_fit() -> None:
    weight = prepare_weight(make_weight("group", 64, 128), "cpu")
    with pytest.raises(OpError, match=r"codes must have shape \[M=2, 128=\?\], not \[2, 64\]"):
        quantized_linear(quantize_activation(torch.randn(2, 64)), weight)
    with pytest.raises(OpError, match="bias must have shape"):
        quantized_linear(quantize_activation(torch.randn(2, 128)), weight, torch.zeros(3))


def test_activation_rounding_rule() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    quantized = quantize_per_token(x)
    assert quantized.codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]
    magnitudes = torch.randn(5000, 1) * 2.0 ** torch.randint(-110, 120, (5000, 1))
    assert (quantize_activation(magnitudes).codes.abs() == 127).all()
    assert quantized.scale.tolist() == [1.0, 0.0]
    assert quantized.row_sum.tolist() == [0, 0]


def test_activations_below_all_normal_floats_have_codes() -> None:
    x = torch.tensor([[1e-38, -1e-38, 0, 5e-39], [1e-44, 0, 0, -1e-44]])
    codes = quantize_activation(x).codes
    assert (codes[0, :2].tolist(), codes[0, 2:].tolist()) == ([3, -3], [0, 2])
    assert codes[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_and_its_quantized_twin(dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype)
    weight = torch.rand(96).to(dtype)
    total = (x + residual).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    normed, kept = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(kept, x + residual)
    torch.testing.assert_close(normed.double(), expected, rtol=0.01, atol=0.01)
    quantized, _ = rms_norm_quantize(x, weight, 1e-5, residual)
    assert (quantized.dequantize().double() - expected).abs().max() <= quantized.scale.max() * 0.51
    assert torch.equal(quantized.row_sum, quantized.codes.sum(-1).int())


def test_rms_norm_keeps_the_mean() -> None:
    x = torch.full((1, 64), 3.0)
    assert torch.allclose(rms_norm(x, torch.ones(64), 0.0)[0], torch.ones(1, 64))


def test_silu_mul_and_its_quantized_twin() -> None:
    gate_up = torch.randn(3, 128)
    expected = torch.nn.functional.silu(gate_up[:, :64].double()) * gate_up[:, 64:].double()
    torch.testing.assert_close(silu_mul(gate_up).double(), expected, rtol=1e-6, atol=1e-6)
    quantized = silu_mul_quantize(gate_up)
    error = (quantized.dequantize().double() - expected).abs()
    assert (error <= quantized.scale[:, None] * 0.501).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), bits=st.sampled_from([4, 8]), dim=st.sampled_from([64, 128]))
def test_kv_error_is_half_a_step(seed: int, bits: int, dim: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(6, 2, dim) * 10 ** torch.empty(6, 2, 1).uniform_(-3, 3)
    quantized = quantize_kv(x, bits)
    bound = quantized.scale.float() * 0.5 + x.abs().amax(-1) * 2e-3
    assert ((quantized.dequantize() - x).abs() <= bound[..., None]).all()


@pytest.mark.parametrize("value", [0.0, 3.25, -7.0])
def test_kv_of_a_constant_row_is_exact(value: float) -> None:
    x = torch.full((1, 1, 64), value)
    assert torch.equal(quantize_kv(x, 4).dequantize(), x)


def batch_of(contexts: list[int], queries: list[int], num_pages: int) -> PagedBatch:
    """Sequences on shuffled, disjoint pages."""
    pages = torch.randperm(num_pages, dtype=torch.int32)
    widest = max(-(-context // 64) for context in contexts)
    table = torch.zeros(len(contexts), widest, dtype=torch.int32)
    positions, slots, used = [], [], 0
    for row, (context, count) in enumerate(zip(contexts, queries, strict=True)):
        needed = -(-context // 64)
        table[row, :needed] = pages[used : used + needed]
        used += needed
        where = torch.arange(context - count, context)
        positions.append(where)
        slots.append(table[row, where // 64].long() * 64 + where % 64)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lens = torch.tensor(contexts, dtype=torch.int32)
    return PagedBatch(
        torch.cat(positions), torch.cat(slots), starts, lens, table, max(queries), max(contexts)
    )


def dense_attention(q, keys, values, window):  # type: ignore[no-untyped-def]
    """float64, one sequence: q [L, Hq, D], keys and values [C, Hkv, D]."""
    length, heads, dim = q.shape
    context, kv_heads = keys.shape[:2]
    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    scores = torch.einsum("lhd,chd->hlc", q.double(), keys) / math.sqrt(dim)
    query = torch.arange(context - length, context)[:, None]
    key = torch.arange(context)[None]
    hidden = (key > query) | (key <= query - (window or context + 1))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hlc,chd->lhd", weights, values).reshape(length, heads * dim)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", [None, 70])
def test_attention_over_the_same_bytes(bits: int, dim: int, window: int | None) -> None:
    kv_format = KVFormat(bits, dim, num_kv_heads=2)
    contexts, queries = [1, 64, 65, 200, 300], [1, 64, 1, 37, 290]
    pool = kv_format.new_pool(16).fill_(255)  # unwritten scales are NaN
    batch = batch_of(contexts, queries, 16)
    for row, context in enumerate(contexts):
        where = torch.arange(context)
        slots = batch.page_table[row, where // 64].long() * 64 + where % 64
        write_tokens(
            pool, kv_format, slots, torch.randn(context, 2, dim), torch.randn(context, 2, dim)
        )
    q = torch.randn(sum(queries), 6, dim)
    out = paged_attention(q, batch, pool, kv_format, 1 / math.sqrt(dim), window)
    keys, values = (x.transpose(1, 2) for x in dequantize_blocks(pool, kv_format))
    for row, context in enumerate(contexts):
        rows = slice(int(batch.query_start[row]), int(batch.query_start[row + 1]))
        pages = batch.page_table[row].long()
        expected = dense_attention(
            q[rows],
            keys[pages].flatten(0, 1)[:context],
            values[pages].flatten(0, 1)[:context],
            window,
        )
        torch.testing.assert_close(out[rows].double(), expected, rtol=1e-5, atol=1e-5)


def test_rope_append_writes_rotated_keys_and_plain_values() -> None:
    kv_format = KVFormat(16, 64, num_kv_heads=1)
    pool = kv_format.new_pool(4).zero_()
    batch = batch_of([10, 3], [4, 3], 4)
    angles = torch.rand(16, 32)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    qkv = torch.randn(7, 4 * 64)
    q = rope_append(qkv, table, batch, pool, kv_format, num_query_heads=2)
    heads = qkv.reshape(7, 4, 64)
    turn = torch.polar(torch.ones_like(angles), angles)[batch.positions][:, None]
    rotated = torch.complex(heads[:, :3, :32], heads[:, :3, 32:]) * turn
    expected = torch.cat((rotated.real, rotated.imag), dim=-1)
    torch.testing.assert_close(q, expected[:, :2])
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in dequantize_blocks(pool, kv_format))
    torch.testing.assert_close(keys[batch.slots].float(), expected[:, 2:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values[batch.slots].float(), heads[:, 3:], rtol=1e-3, atol=1e-3)
    untouched = torch.ones(4 * 64, dtype=torch.bool).index_fill(0, batch.slots, False)
    assert not keys[untouched].any() and not values[untouched].any()


def test_the_hadamard_cancels_in_scores() -> None:
    q, k = torch.randn(5, 64), torch.randn(5, 64)
    torch.testing.assert_close(
        apply_hadamard(q) @ apply_hadamard(k).T, q @ k.T, rtol=1e-4, atol=1e-5
    )


def test_hadamard_makes_kv4_of_outlier_keys_better() -> None:
    keys = torch.randn(200, 1, 64)
    keys[..., 5] *= 30
    plain = (quantize_kv(keys, 4).dequantize() - keys).square().mean()
    turned = apply_hadamard(keys)
    assert (quantize_kv(turned, 4).dequantize() - turned).square().mean() < plain / 2
