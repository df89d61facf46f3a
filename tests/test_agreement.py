"""What counts as a tie: the judge of the tests on a GPU."""

from __future__ import annotations

import math

from qserve.engine.llm import Completion
from qserve.engine.request import TokenLogprob
from qserve.testing.agreement import compare


def text(*steps: dict[int, float]) -> Completion:
    """A text from the log probabilities of each step's likeliest tokens, the best of them chosen."""
    scores = []
    for step in steps:
        top = tuple(sorted(step.items(), key=lambda item: -item[1]))
        scores.append(TokenLogprob(*top[0], rank=1, top=top))
    return Completion(token_ids=[score.token_id for score in scores], logprobs=scores)


SURE = {1: -0.1, 2: -3.0}


def test_equal_texts_agree_and_show_the_noise_between_them() -> None:
    agreement = compare([text(SURE, SURE)], [text(SURE, {1: -0.11, 2: -2.95})])
    assert math.isclose(agreement.noise, 0.05) and math.isclose(agreement.typical, 0.005)
    assert (agreement.steps, agreement.divergences) == (2, ())
    assert agreement.are_ties_within(0.0)


def test_a_divergence_is_a_tie_only_within_the_noise_of_both_candidates() -> None:
    noisy = text({1: -0.12, 2: -2.99}, {2: -0.69, 1: -0.70}, {9: -0.1})
    close = compare([text(SURE, {1: -0.68, 2: -0.70}, SURE)], [noisy])
    assert (close.steps, close.divergences[0].step) == (1, 1)
    assert math.isclose(close.divergences[0].gap, 0.02) and math.isclose(close.noise, 0.02)
    assert close.are_ties_within(close.noise) and not close.are_ties_within(0.009)
    wide = compare([text(SURE, {1: -0.65, 2: -0.70}, SURE)], [noisy])
    assert not wide.are_ties_within(wide.noise)


def test_what_follows_a_divergence_does_not_count_as_noise() -> None:
    reference = text(SURE, {1: -0.50, 2: -0.51}, {3: -0.1, 4: -9.0})
    other = text({1: -0.11, 2: -3.0}, {2: -0.40, 1: -0.91}, {3: -5.0, 4: -6.0})
    assert math.isclose(compare([reference], [other]).noise, 0.01)


def test_a_token_that_the_reference_does_not_consider_is_no_tie() -> None:
    agreement = compare([text(SURE)], [text({7: -0.1, 1: -0.2})])
    assert agreement.divergences[0].gap == math.inf and not agreement.are_ties_within(9.0)
