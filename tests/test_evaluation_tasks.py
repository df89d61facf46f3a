"""The lm-evaluation-harness on a served model: its scores against sums over Hugging Face's logits."""

from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from qserve.cli import main
from qserve.config import EngineConfig
from qserve.engine.llm import LLM
from qserve.engine.loading import LoadedModel, load_model
from qserve.engine.request import SamplingParams
from qserve.evaluation.tasks import ServedLM, TaskError, evaluate_tasks, sampling_params
from qserve.models.source import open_source
from qserve.testing.tiny import (
    save_tiny_model,
    tiny_config,
    tiny_hf_model,
    tiny_source,
    tiny_tokenizer,
)

CONFIG = tiny_config(max_position_embeddings=64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(open_source(str(directory)), EngineConfig())


def instances(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def reference(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Summed log-probabilities of the continuation, and whether each token is the likeliest."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = tiny_hf_model(tiny_source(CONFIG))(tokens[:, :-1]).logits[0].double()
    rows = logits[-len(continuation) :].log_softmax(-1)
    chosen = torch.tensor(continuation)
    total = float(rows.gather(1, chosen[:, None]).sum())
    return total, torch.equal(rows.argmax(-1), chosen)


def test_loglikelihood(model: LoadedModel) -> None:
    encode = model.tokenizer.encode
    pairs = [("The cat", " sat"), ("x ", "y"), ("", "abc"), ("one", " two three"), ("a", "b")]
    tokens = [
        (encode("The cat"), encode(" sat")),
        (encode("x"), encode(" y")),
        ([0], encode("abc")),  # nothing is before it but the beginning of text
        (encode("one"), encode(" two three")),
        (encode("a"), encode("b")),
    ]
    results = ServedLM(model).loglikelihood(instances("loglikelihood", *pairs))
    for result, (context, continuation) in zip(results, tokens, strict=True):
        total, greedy = reference(context, continuation)
        assert result[0] == pytest.approx(total, rel=1e-3) and result[1] == greedy


def test_texts_begin_once(model: LoadedModel) -> None:
    """With the token that tokenizers of some models add, also where a chat template wrote it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    served = ServedLM(replace(model, tokenizer=tokenizer))
    letters = tiny_tokenizer().encode("hi")
    assert served.tok_encode("hi") == served.tok_encode(f"{tokenizer.bos_token}hi") == [0, *letters]
    assert served.tok_encode("hi", add_special_tokens=False) == letters


def test_greedy_continuation_is_recognised(model: LoadedModel) -> None:
    served = ServedLM(model)
    prompt = model.tokenizer.encode("hello")
    with torch.no_grad():
        logits = tiny_hf_model(tiny_source(CONFIG))(torch.tensor([prompt])).logits[0, -1]
    second, likeliest = logits.argsort()[-2:].tolist()
    requests = [("", prompt, [likeliest]), ("", prompt, [second])]
    assert [is_greedy for _, is_greedy in served._loglikelihood_tokens(requests)] == [True, False]


def test_long_context_loses_its_beginning(model: LoadedModel) -> None:
    """64 positions read 64 tokens, and the 65th is predicted."""
    context, continuation = "c" * 100, "def"
    (result,) = ServedLM(model).loglikelihood(instances("loglikelihood", (context, continuation)))
    tokens = model.tokenizer.encode(context + continuation)[-65:]
    expected = reference(tokens[:-3], tokens[-3:])
    assert result[0] == pytest.approx(expected[0], rel=1e-3)


def test_rolling_loglikelihood(model: LoadedModel) -> None:
    """Each token once; the last window reads as far back as it can."""
    text = "".join(random.Random(0).choices(string.ascii_letters, k=150))
    tokenize = model.tokenizer.encode
    tokens = tokenize(text)
    requests = instances("loglikelihood_rolling", ("abc",), (text,))
    short, result = ServedLM(model).loglikelihood_rolling(requests)
    assert short == pytest.approx(reference([0], tokenize("abc"))[0], rel=1e-3)
    expected = reference([0], tokens[:64])[0]
    expected += reference(tokens[63:64], tokens[64:128])[0]
    last = len(tokens) - 128
    expected += reference(tokens[-65:-last], tokens[-last:])[0]
    assert result == pytest.approx(expected, rel=1e-3)


def test_what_nothing_stands_before_needs_a_special_token(model: LoadedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    served = ServedLM(replace(model, tokenizer=tokenizer))
    with pytest.raises(TaskError, match="names no token that ends a text"):
        served.loglikelihood(instances("loglikelihood", ("", "abc")))


def test_generation(model: LoadedModel, directory: Path) -> None:
    served = ServedLM(model)
    prompts = ["hello", "the quick brown fox", "p" * 100]
    arguments = {"until": [], "max_gen_toks": 12}
    texts = served.generate_until(
        instances("generate_until", *((prompt, arguments) for prompt in prompts))
    )
    llm = LLM(directory)
    cut = [model.tokenizer.encode(prompt)[-52:] for prompt in prompts]
    params = SamplingParams(max_tokens=12, temperature=0)
    assert texts == [each.text for each in llm.generate(cut, params)]
    stop = next(character for text in texts for character in text if character.isascii())
    stopped = served.generate_until(
        instances("generate_until", *((prompt, {**arguments, "until": stop}) for prompt in prompts))
    )
    assert stopped == [text.split(stop)[0] for text in texts] != texts


def test_generation_arguments() -> None:
    assert sampling_params({"until": ["\n", ""]}) == SamplingParams(
        max_tokens=256, temperature=0, seed=0, stop=("\n",)
    )
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
    params = sampling_params(sampled)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.7, 0.9, 5)
    assert sampling_params({"do_sample": False, "temperature": 0.7}).temperature == 0
    with pytest.raises(TaskError, match="'num_beams' is not supported"):
        sampling_params({"num_beams": 4})


def test_room_for_a_prompt(model: LoadedModel) -> None:
    with pytest.raises(TaskError, match="max_gen_toks 64 leaves no room"):
        ServedLM(model).generate_until(instances("generate_until", ("x", {"max_gen_toks": 64})))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a multiple-choice and a generation task on local data.

    The harness's own thousands are left out, which take long to index.
    """
    monkeypatch.setattr(
        "qserve.evaluation.tasks.TaskManager", partial(TaskManager, include_defaults=False)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": "a b c", "choices": [" d", " z", " q"], "answer": index % 3}
        for index in range(6)
    ]
    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    copying = {
        "task": "local_copying",
        "output_type": "generate_until",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, copying):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**shared, **task}))
    return tmp_path


def test_tasks_of_the_harness(model: LoadedModel, tasks: Path) -> None:
    results = evaluate_tasks(model, ["local_choice", "local_copying"], include_path=tasks)
    # One choice is likeliest for all rows, and a third of them have it for an answer.
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(1 / 3)
    assert results["results"]["local_copying"]["exact_match,none"] == 0
    assert results["n-samples"]["local_choice"]["effective"] == 6
    limited = evaluate_tasks(model, ["local_choice"], include_path=tasks, limit=2)
    assert limited["n-samples"]["local_choice"]["effective"] == 2


def test_tasks_by_command(capsys: pytest.CaptureFixture[str], directory: Path, tasks: Path) -> None:
    options = ["--include-path", str(tasks), "--limit", "3"]
    command = ["evaluate", "tasks", str(directory), "--tasks", "local_choice", *options]
    for as_json in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit_:
            main([*command, *as_json])
        assert not exit_.value.code
    table, result = capsys.readouterr().out.rsplit("\n{", 1)
    assert json.loads("{" + result)["local_choice"]["acc,none"] == pytest.approx(1 / 3)
    assert "|local_choice|" in table


def test_unknown_task(model: LoadedModel, tasks: Path) -> None:
    with pytest.raises(TaskError, match="there is no task 'nonsense'"):
        evaluate_tasks(model, ["local_choice", "nonsense"], include_path=tasks)
