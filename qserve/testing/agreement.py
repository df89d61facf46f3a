"""Whether two ways to compute the same greedy texts agree, but for ties within their rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from qserve.engine.engine import Engine
from qserve.engine.llm import Completion
from qserve.engine.request import SamplingParams, TokenLogprob

NUM_TOP = 5


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
    """noise: the largest difference of a token's log probability between the two, over all steps
    before texts part. steps: how many those are."""

    texts: int
    steps: int
    noise: float
    divergences: tuple[Divergence, ...]

    @property
    def all_ties(self) -> bool:
        """Whether rounding explains every divergence: it moves both of two candidates."""
        return all(divergence.gap <= 2 * self.noise for divergence in self.divergences)

    def __str__(self) -> str:
        gaps = ", ".join(f"{d.gap:.4f} at step {d.step}" for d in self.divergences)
        return (
            f"{self.texts - len(self.divergences)} of {self.texts} texts agree ({self.steps} steps "
            f"alike), noise {self.noise:.5f}; gaps where they part: {gaps or 'none'}"
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
    noise, steps, divergences = 0.0, 0, []
    for index, (ours, theirs) in enumerate(zip(reference, other, strict=True)):
        scores = list(zip(ours.logprobs or (), theirs.logprobs or (), strict=True))
        alike = len(list(takewhile(lambda pair: pair[0].token_id == pair[1].token_id, scores)))
        steps += alike
        noise = max([noise, *(_difference(*pair) for pair in scores[:alike])])
        if alike < len(scores):
            divergences.append(Divergence(index, alike, _gap(*scores[alike])))
    return Agreement(len(reference), steps, noise, tuple(divergences))


def _difference(ours: TokenLogprob, theirs: TokenLogprob) -> float:
    """The largest, of the tokens that both know."""
    known = dict(theirs.top)
    return max((abs(value - known[t]) for t, value in ours.top if t in known), default=0.0)


def _gap(ours: TokenLogprob, theirs: TokenLogprob) -> float:
    return ours.logprob - dict(ours.top).get(theirs.token_id, float("-inf"))
