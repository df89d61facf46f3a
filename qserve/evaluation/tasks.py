"""Zero- and few-shot tasks of the lm-evaluation-harness, on the code path that serves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.loading import LoadedModel
from qserve.engine.request import SamplingParams
from qserve.engine.text import encode
from qserve.evaluation.sequences import SequenceScorer

_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Generation arguments that mean the same here as in the harness."""


class TaskError(ValueError):
    """A task is unknown or asks for what is not supported; the message names it."""


def evaluate_tasks(
    model: LoadedModel,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's results: under "results", metrics by task.

    include_path: a directory of further tasks. num_fewshot: instead of the tasks' own. limit:
    examples of each task at most. Raises TaskError if a task is unknown.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = set(tasks) - set(manager.all_tasks)
    if unknown:
        raise TaskError(f"there is no task {min(unknown)!r}")
    results: dict[str, Any] = simple_evaluate(
        ServedLM(model),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return results


class ServedLM(TemplateLM):  # type: ignore[misc]
    """The harness's view of a model: likelihoods by `SequenceScorer`, texts by the engine.

    Texts are tokenized as prompts are; what is too long loses its beginning.
    """

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer
        self._model = model
        self._scorer = SequenceScorer(model)
        self.max_length = self._scorer.max_length - 1

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise TaskError("the model's tokenizer names no token that ends a text")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with the tokenizer's special ones unless the text begins with them already."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is False or (bos and string.startswith(bos)):
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return encode(self.tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of (_, context, continuation)."""
        sequences = [
            (context + continuation)[-self._scorer.max_length :]
            for _, context, continuation in requests
        ]
        results: list[tuple[float, bool]] = []
        for (_, _, continuation), score in zip(
            requests, self._scorer.score(sequences, progress=True), strict=True
        ):
            scored = slice(-len(continuation), None)
            total = float(score.logprobs[scored].double().sum())
            results.append((total, bool(score.is_likeliest[scored].all())))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, cut into windows that read as much as the model can."""
        texts = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._loglikelihood_tokens([window for text in texts for window in text]))
        return [sum(total for total, _ in islice(scores, len(text))) for text in texts]

    def _windows(self, text: str) -> list[tuple[Any, list[int], list[int]]]:
        """(_, context, continuation) of each window; every token is in one continuation."""
        token_ids = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length, 1)
        return [(None, *make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the engine generates after each text, all of them in one queue."""
        engine = Engine(
            self._model.decoder, self.tokenizer, EngineConfig(), self._model.quantization
        )
        for index, request in enumerate(requests):
            prompt, arguments = request.args
            params = sampling_params(arguments)
            room = self.max_length - (params.max_tokens or 0)
            if room < 1:
                raise TaskError(f"max_gen_toks {params.max_tokens} leaves no room for a prompt")
            engine.add_request(str(index), self.tok_encode(prompt)[-room:], params)
        texts = [""] * len(requests)
        while engine.has_unfinished:
            for output in engine.step():
                texts[int(output.request_id)] += output.outputs[0].text
        return texts


def sampling_params(arguments: dict[str, Any]) -> SamplingParams:
    """Generation arguments in the harness's terms; TaskError names one that is not supported."""
    known: dict[str, Any] = dict(normalize_gen_kwargs(arguments))
    stop = tuple(text for text in known.pop("until") if text)
    max_tokens = known.pop("max_gen_toks")
    temperature = known.pop("temperature", 1.0)
    temperature = temperature if known.pop("do_sample") else 0.0
    unknown = known.keys() - set(_SAMPLING)
    if unknown:
        raise TaskError(f"generation argument {min(unknown)!r} is not supported")
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=0, stop=stop, **known
    )
