"""Whether two ways to compute the same greedy texts agree, but for ties within their rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median

from qserve.engine.engine import Engine
from qserve.engine.llm import Completion
from qserve.engine.request import SamplingParams, TokenLogprob

NUM_TOP = 100
"""Candidates whose log probabilities are compared at each step; a flat distribution has many."""


@dataclass(frozen=True)
class Divergence:
    """The first step at which two texts differ.

    gap: by how much the log probability of the reference's token exceeds that of the other's token,
    under the reference; infinite if the other's is not among its likeliest.
    """

    text: int
    step: int
    gap: float


@dataclass(frozen=True)
class Agreement:
    """steps: those before texts part. typical, noise: the median and the largest difference of a
    candidate's log probability between the two, over these steps."""

    texts: int
    steps: int
    typical: float
    noise: float
    divergences: tuple[Divergence, ...]

    def are_ties_within(self, noise: float) -> bool:
        """Whether noise of this size explains every divergence: it moves both of two candidates."""
        return all(divergence.gap <= 2 * noise for divergence in self.divergences)

    def __str__(self) -> str:
        gaps = ", ".join(f"{d.gap:.4f} at step {d.step}" for d in self.divergences)
        return (
            f"{self.texts - len(self.divergences)} of {self.texts} texts agree ({self.steps} steps "
            f"alike), noise {self.typical:.5f}, at most {self.noise:.5f}; "
            f"gaps where they part: {gaps or 'none'}"
        )


def greedy(engine: Engine, prompts: Sequence[list[int]], max_tokens: int) -> list[Completion]:
    """Each prompt's likeliest continuation, with log probabilities."""
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=NUM_TOP
    )
    completions = [Completion() for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    while engine.has_unfinished:
        for output in engine.step():
            completions[int(output.request_id)].extend(output.outputs[0])
    engine.check_integrity()
    return completions


def compare(reference: Sequence[Completion], other: Sequence[Completion]) -> Agreement:
    """Of the same prompts, both with log probabilities."""
    steps, differences, divergences = 0, [], []
    for index, (ours, theirs) in enumerate(zip(reference, other, strict=True)):
        scores = list(zip(ours.logprobs or (), theirs.logprobs or (), strict=True))
        alike = len(list(takewhile(lambda pair: pair[0].token_id == pair[1].token_id, scores)))
        steps += alike
        differences += [value for pair in scores[:alike] for value in _differences(*pair)]
        if alike < len(scores):
            divergences.append(Divergence(index, alike, _gap(*scores[alike])))
    differences = differences or [0.0]
    return Agreement(
        len(reference), steps, median(differences), max(differences), tuple(divergences)
    )


def _differences(ours: TokenLogprob, theirs: TokenLogprob) -> list[float]:
    """Of the candidates that both know."""
    known = dict(theirs.top)
    return [abs(value - known[token]) for token, value in ours.top if token in known]


def _gap(ours: TokenLogprob, theirs: TokenLogprob) -> float:
    return ours.logprob - dict(ours.top).get(theirs.token_id, float("-inf"))
