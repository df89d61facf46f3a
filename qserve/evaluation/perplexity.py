"""Perplexity, measured on the code path that serves."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qserve.engine.llm import LLM
from qserve.engine.request import SamplingParams
from qserve.engine.text import encode


@dataclass(frozen=True)
class Perplexity:
    """tokens: how many were scored. seconds: wall time, tokenization not counted."""

    perplexity: float
    tokens: int
    windows: int
    seconds: float


def measure_perplexity(
    llm: LLM,
    text: str,
    window_length: int = 1024,
    max_windows: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """exp of the mean negative log-likelihood of a text's tokens, each window on its own.

    The text is tokenized once, as prompts are, and cut into windows of `window_length` tokens
    without overlap, of which the first `max_windows` count; a rest that fills no window is dropped.
    Every token is scored but each window's first. Raises ValueError if there is no window, and
    RequestError if a window does not fit the model.
    """
    windows = _windows(encode(llm.engine.tokenizer, text), window_length, max_windows)
    start = time.perf_counter()
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0)
    generations = llm.generate(windows, scoring, progress=progress)
    logprobs = [
        entry.logprob
        for generation in generations
        for entry in generation.prompt_logprobs or ()
        if entry
    ]
    mean = math.fsum(logprobs) / len(logprobs)
    return Perplexity(math.exp(-mean), len(logprobs), len(windows), time.perf_counter() - start)


def _windows(token_ids: Sequence[int], length: int, max_windows: int | None) -> list[list[int]]:
    if length < 2:
        raise ValueError(f"a window must have at least 2 tokens, got {length}")
    starts = range(0, len(token_ids) - length + 1, length)[:max_windows]
    if not starts:
        raise ValueError(f"the text has {len(token_ids)} tokens, less than one window of {length}")
    return [list(token_ids[start : start + length]) for start in starts]
