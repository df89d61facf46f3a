"""Perplexity, measured on the code path that serves."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from qserve.engine.loading import LoadedModel
from qserve.evaluation.sequences import SequenceScorer
from qserve.evaluation.text import text_windows

WINDOW_LENGTH = 2048
"""Tokens of a window, as is customary."""


@dataclass(frozen=True)
class Perplexity:
    """tokens: how many were scored. seconds: wall time, tokenization not counted."""

    perplexity: float
    tokens: int
    windows: int
    seconds: float


def measure_perplexity(
    model: LoadedModel,
    text: str,
    window_length: int = WINDOW_LENGTH,
    max_windows: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """exp of the mean negative log-likelihood of a text's tokens, each window on its own.

    Windows are those of `text_windows`; every token is scored but each window's first. Raises
    ValueError if there is no window or a window exceeds the model's positions.
    """
    windows = text_windows(model.tokenizer, text, window_length, max_windows)
    start = time.perf_counter()
    scores = SequenceScorer(model).score(windows, progress)
    logprobs = [logprob for score in scores for logprob in score.logprobs.tolist()]
    mean = math.fsum(logprobs) / len(logprobs)
    return Perplexity(math.exp(-mean), len(logprobs), len(windows), time.perf_counter() - start)
