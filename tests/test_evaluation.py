"""Perplexity, against Hugging Face's implementation and against the serving engine's own scores."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from qserve.config import ConfigError, EngineConfig
from qserve.engine.llm import LLM
from qserve.engine.loading import LoadedModel, load_model
from qserve.engine.request import SamplingParams
from qserve.evaluation import sequences
from qserve.evaluation.perplexity import measure_perplexity
from qserve.evaluation.sequences import SequenceScorer
from qserve.evaluation.text import TextError, dataset_text, text_windows
from qserve.models.source import open_source
from qserve.quant.pipeline import quantize
from qserve.quant.recipe import Recipe
from qserve.testing.tiny import save_tiny_model, tiny_hf_model, tiny_source

TEXT = "The quick brown fox jumps over the lazy dog; äöü. " * 12
W4A8KV4 = Recipe("test", k_hadamard=True, k_center=True, rounding="nearest", sequences=4, length=64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def quantized(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized")
    (output / "text").write_text("Some text to calibrate with, and not much of it. " * 20)
    quantize(open_source(str(directory)), output / "model", W4A8KV4, 64, str(output / "text"))
    return output / "model"


def load(directory: Path, **settings: object) -> LoadedModel:
    return load_model(open_source(str(directory)), EngineConfig(**settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load(directory)


def reference_perplexity(windows: torch.Tensor) -> float:
    with torch.no_grad():
        logits = tiny_hf_model(tiny_source())(windows).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten()
    )
    return math.exp(loss.item())


@pytest.mark.parametrize(("length", "max_windows"), [(100, None), (64, 3), (7, 20), (512, 1)])
def test_equals_hugging_face(model: LoadedModel, length: int, max_windows: int | None) -> None:
    """Also for windows of all the model's 512 positions."""
    token_ids = model.tokenizer.encode(TEXT)
    windows = [token_ids[i : i + length] for i in range(0, len(token_ids), length)][:max_windows]
    windows = [window for window in windows if len(window) == length]
    result = measure_perplexity(model, TEXT, length, max_windows)
    assert result.windows == len(windows) and result.tokens == len(windows) * (length - 1)
    # 16-bit pages round keys and values to 11 bits.
    assert result.perplexity == pytest.approx(reference_perplexity(torch.tensor(windows)), rel=2e-4)


@pytest.mark.parametrize("max_batched_tokens", [13, 64, 100, 1024])
def test_equals_the_serving_engine(quantized: Path, max_batched_tokens: int) -> None:
    """Prefill in chunks over quantized pages with W4A8 ops, several requests together."""
    llm = LLM(quantized, max_num_sequences=3, max_batched_tokens=max_batched_tokens)
    windows = text_windows(llm.engine.tokenizer, TEXT, 100)
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scores = [generation.prompt_logprobs or () for generation in llm.generate(windows, scoring)]
    logprobs = [entry.logprob for window in scores for entry in window if entry]
    served = math.exp(-math.fsum(logprobs) / len(logprobs))
    result = measure_perplexity(load(quantized), TEXT, 100)
    assert result.tokens == len(logprobs) > 500
    assert abs(result.perplexity - served) < 1e-3
    # What is far from the unquantized model's, so that the bound above says something.
    assert abs(measure_perplexity(load(quantized, kv_bits=16), TEXT, 100).perplexity - served) > 0.1


def test_does_not_depend_on_company(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SequenceScorer(load(quantized))
    token_ids = torch.randint(320, (400,)).tolist()
    texts = [token_ids[:130], token_ids[130:132], token_ids[132:333], token_ids[333:]]
    together = scorer.score(texts)
    monkeypatch.setattr(sequences, "CPU_TOKENS", 140)
    monkeypatch.setattr(sequences, "_LOGITS", 320 * 7)
    for text, one, other in zip(texts, together, scorer.score(texts), strict=True):
        assert len(one.logprobs) == len(text) - 1
        assert torch.equal(one.logprobs, other.logprobs)
        assert torch.equal(one.is_likeliest, other.is_likeliest)
    assert scorer.score([]) == []


def test_likeliest_tokens_are_those_that_greedy_generation_takes(quantized: Path) -> None:
    llm = LLM(quantized, max_num_sequences=1)
    prompt = llm.engine.tokenizer.encode("hello")
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    generated = llm.generate([prompt], params)[0].completions[0].token_ids
    (score,) = SequenceScorer(load(quantized)).score([prompt + generated])
    assert score.is_likeliest[len(prompt) - 1 :].all()
    other = [*generated[:-1], (generated[-1] + 1) % 320]
    (score,) = SequenceScorer(load(quantized)).score([prompt + other])
    assert score.is_likeliest[len(prompt) - 1 :].tolist() == [True] * 19 + [False]


def test_each_format_can_be_evaluated_without(quantized: Path) -> None:
    def perplexity(**settings: int) -> float:
        return measure_perplexity(load(quantized, **settings), TEXT, 100).perplexity

    served = perplexity()
    assert served == perplexity(kv_bits=4, activation_bits=8)
    settings = ({"kv_bits": 16}, {"kv_bits": 8}, {"activation_bits": 16}, {})
    assert len({perplexity(**setting) for setting in settings}) == 4


def test_int8_activations_need_quantized_weights(directory: Path) -> None:
    with pytest.raises(ConfigError, match="activation_bits 8 needs quantized weights"):
        load(directory, activation_bits=8)
    with pytest.raises(ConfigError, match="activation_bits must be 8 or 16, got 4"):
        load(directory, activation_bits=4)


@pytest.mark.parametrize("length", [1, 0])
def test_window_without_a_scored_token(model: LoadedModel, length: int) -> None:
    with pytest.raises(TextError, match="at least 2 tokens"):
        measure_perplexity(model, TEXT, length)


def test_text_shorter_than_a_window(model: LoadedModel) -> None:
    with pytest.raises(TextError, match="less than one window"):
        measure_perplexity(model, "short", 100)


def test_window_longer_than_the_model(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="514 tokens exceeds the model's 512 positions"):
        measure_perplexity(model, TEXT, 514)


# Data sets.


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    return tmp_path


def test_wikitext_is_joined_as_is_customary(hub_cache: Path) -> None:
    repository = hub_cache / "datasets--Salesforce--wikitext"
    snapshot = repository / "snapshots" / ("0" * 40) / "wikitext-2-raw-v1"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    lines = ["", " = Robert Boulter = \n", "", " an English film , actor \n"]
    parquet.write_table(pyarrow.table({"text": lines}), snapshot / "test-00000-of-00001.parquet")
    expected = "\n\n = Robert Boulter = \n\n\n\n\n an English film , actor \n"
    assert dataset_text("wikitext2") == expected == "\n\n".join(lines)


def test_data_set_that_cannot_be_had(hub_cache: Path) -> None:
    with pytest.raises(TextError, match="wikitext2: the hub does not give it"):
        dataset_text("wikitext2")
    with pytest.raises(TextError, match="there is no data set 'c4'; there are wikitext2"):
        dataset_text("c4")
