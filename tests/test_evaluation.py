"""Perplexity through the engine, against Hugging Face's implementation on the same windows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qserve.engine.llm import LLM
from qserve.engine.request import RequestError
from qserve.evaluation.perplexity import measure_perplexity
from qserve.testing.tiny import save_tiny_model, tiny_hf_model, tiny_source

TEXT = "The quick brown fox jumps over the lazy dog; äöü. " * 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, max_num_sequences=4)


def reference_perplexity(windows: torch.Tensor) -> float:
    with torch.no_grad():
        logits = tiny_hf_model(tiny_source())(windows).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten()
    )
    return math.exp(loss.item())


@pytest.mark.parametrize(("length", "max_windows"), [(100, None), (64, 3), (7, 20)])
def test_equals_hugging_face(llm: LLM, length: int, max_windows: int | None) -> None:
    token_ids = llm.engine.tokenizer.encode(TEXT)
    windows = [token_ids[i : i + length] for i in range(0, len(token_ids), length)][:max_windows]
    windows = [window for window in windows if len(window) == length]
    result = measure_perplexity(llm, TEXT, length, max_windows)
    assert result.windows == len(windows) and result.tokens == len(windows) * (length - 1)
    # 16-bit pages round keys and values to 11 bits.
    assert result.perplexity == pytest.approx(reference_perplexity(torch.tensor(windows)), rel=2e-4)


def test_does_not_depend_on_chunks(directory: Path, llm: LLM) -> None:
    chunked = LLM(directory, max_num_sequences=4, max_batched_tokens=13)
    expected = measure_perplexity(llm, TEXT, 100).perplexity
    assert measure_perplexity(chunked, TEXT, 100).perplexity == pytest.approx(expected, rel=1e-9)


def test_few_bit_cache_is_what_is_measured(directory: Path, llm: LLM) -> None:
    four = LLM(directory, max_num_sequences=4, kv_bits=4)
    exact, coarse = (measure_perplexity(model, TEXT, 100).perplexity for model in (llm, four))
    assert abs(coarse / exact - 1) > 1e-3


@pytest.mark.parametrize("length", [1, 0])
def test_window_without_a_scored_token(llm: LLM, length: int) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        measure_perplexity(llm, TEXT, length)


def test_text_shorter_than_a_window(llm: LLM) -> None:
    with pytest.raises(ValueError, match="less than one window"):
        measure_perplexity(llm, "short", 100)


def test_window_longer_than_the_model(llm: LLM) -> None:
    with pytest.raises(RequestError, match="tokens"):
        measure_perplexity(llm, TEXT, 513)
