"""The sampler against plain-Python oracles, exact distributions, and any company in the batch."""

from __future__ import annotations

import math
from collections import Counter

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.engine.logprobs import Scores
from qserve.engine.request import RequestError, SamplingParams
from qserve.engine.sampler import Row, Sampler, uniform
from qserve.engine.sequence import Sequence, sequence_seed

VOCAB = 24


def make_row(
    params: SamplingParams, prompt: list[int], output: list[int], seed: int = 1
) -> Sequence:
    row = Sequence("r", 0, params, list(prompt), seed, 10**6, frozenset({3, 5}))
    row.token_ids += output
    return row


def reseeded(row: Sequence, seed: int) -> Sequence:
    prompt, output = row.token_ids[: row.num_prompt_tokens], row.token_ids[row.num_prompt_tokens :]
    return make_row(row.params, prompt, output, seed)


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """By a sampler that has not met the sequences before."""
    rows = [Row(sequence, len(sequence.token_ids)) for sequence in sequences]
    return Sampler().sample(logits, rows)


def sample_alone(logits: list[float], row: Sequence) -> int:
    return int(sample(torch.tensor([logits]), [row]))


def splitmix64(x: int) -> int:
    """One output of SplitMix64 from state x, in unsigned 64-bit arithmetic."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def oracle_uniform(seed: int, position: int) -> float:
    state = splitmix64(seed) + position * 0x9E3779B97F4A7C15
    return (splitmix64(state % 2**64) >> 12) / 2**52


def oracle_distribution(logits: list[float], row: Sequence) -> dict[int, float]:
    """Probability of each token that may be sampled, from the definitions of the parameters."""
    params, adjusted = row.params, oracle_logits(logits, row)
    best = max(adjusted)
    weights = [math.exp((x - best) / params.temperature) for x in adjusted]
    if params.top_k:
        weights = at_least(weights, sorted(weights, reverse=True)[: params.top_k][-1])
    if params.top_p < 1:
        nucleus = params.top_p * sum(weights)
        ranked = sorted(weights, reverse=True)
        sizes = range(1, len(ranked) + 1)
        size = next(size for size in sizes if sum(ranked[:size]) >= nucleus)
        weights = at_least(weights, ranked[size - 1])
    weights = at_least(weights, params.min_p * max(weights))
    return {token: x / sum(weights) for token, x in enumerate(weights) if x > 1e-9}


def at_least(weights: list[float], bound: float) -> list[float]:
    return [weight if weight >= bound else 0.0 for weight in weights]


def oracle_logits(logits: list[float], row: Sequence) -> list[float]:
    params, adjusted = row.params, list(logits)
    output = Counter(row.token_ids[row.num_prompt_tokens :])
    for token in set(row.token_ids):
        factor = params.repetition_penalty
        adjusted[token] *= 1 / factor if adjusted[token] > 0 else factor
    for token, count in output.items():
        adjusted[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        adjusted[token] += bias
    for token in row.end_token_ids:
        if row.num_output_tokens < params.min_tokens:
            adjusted[token] = -math.inf
    return adjusted


def oracle_sample(logits: list[float], row: Sequence) -> int:
    if row.params.temperature == 0:
        adjusted = oracle_logits(logits, row)
        return adjusted.index(max(adjusted))
    threshold, mass = oracle_uniform(row.seed, len(row.token_ids)), 0.0
    for token, probability in sorted(oracle_distribution(logits, row).items()):
        mass += probability
        if mass > threshold:
            return token
    raise AssertionError("the distribution does not sum to one")


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
all_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.31, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3, 7, VOCAB]),
    top_p=st.sampled_from([1.0, 1.0, 0.03, 0.37, 0.83, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.17, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.9]),
    presence_penalty=st.sampled_from([0.0, -0.4, 1.1]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 0.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=3),
    min_tokens=st.sampled_from([0, 0, 6]),
)
all_rows = st.builds(make_row, all_params, tokens, tokens, st.integers(0, 2**63 - 1))


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(all_rows, min_size=1, max_size=6), noise=st.integers(0, 10**6))
def test_each_row_of_a_mixed_batch_equals_the_oracle(rows: list[Sequence], noise: int) -> None:
    rows = [reseeded(row, seed) for row in rows for seed in (row.seed, 1, 2, 3, 4)]
    generator = torch.Generator().manual_seed(noise)
    logits = 2 * torch.randn(len(rows), VOCAB, generator=generator) - 1
    expected = [oracle_sample(x, row) for x, row in zip(logits.tolist(), rows, strict=True)]
    before = logits.clone()
    assert sample(logits, rows).tolist() == expected
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(all_rows, min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_tokens_count_before_the_host_has_seen_them(rows: list[Sequence], seed: int) -> None:
    generator, sampler = torch.Generator().manual_seed(seed), Sampler()
    texts = [list(row.token_ids) for row in rows]
    for _ in range(4):
        logits = 2 * torch.randn(len(rows), VOCAB, generator=generator) - 1
        known = [make_row(row.params, [], [], row.seed) for row in rows]
        for row, copy, text in zip(rows, known, texts, strict=True):
            copy.token_ids, copy.num_prompt_tokens = text, row.num_prompt_tokens
        lengths = [Row(row, len(text)) for row, text in zip(rows, texts, strict=True)]
        token_ids = sampler.sample(logits, lengths).tolist()
        assert token_ids == sample(logits, known).tolist()
        for text, token_id in zip(texts, token_ids, strict=True):
            text.append(token_id)


def test_the_counts_of_a_sequence_that_is_gone_make_room() -> None:
    sampler, params = Sampler(), SamplingParams(temperature=0, frequency_penalty=50)
    logits = torch.arange(VOCAB).float()[None]
    for _ in range(40):
        row = make_row(params, [1], [])
        assert int(sampler.sample(logits, [Row(row, 1)])) == VOCAB - 1
        assert int(sampler.sample(logits, [Row(row, 2)])) == VOCAB - 2
    assert sampler._counts._table is not None and len(sampler._counts._table) < 40


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 1.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_samples_follow_the_exact_distribution(changes: dict[str, float], vary: str) -> None:
    params = SamplingParams(**changes)  # type: ignore[arg-type]
    logits = (2 * torch.randn(VOCAB)).tolist()
    num_rows = 4000
    if vary == "seed":
        rows = [make_row(params, [1], [], seed) for seed in range(num_rows)]
    else:
        rows = [make_row(params, [1] * length, [], 7) for length in range(1, num_rows + 1)]
    counts = Counter(sample(torch.tensor([logits]).expand(num_rows, -1), rows).tolist())
    expected = oracle_distribution(logits, rows[0])
    assert set(counts) <= set(expected)
    assert chi_square_excess(counts, expected, num_rows) < 5


def chi_square_excess(counts: Counter[int], expected: dict[int, float], total: int) -> float:
    """Standard deviations by which the statistic exceeds its mean; rare tokens are one class."""
    common = [token for token, share in expected.items() if share * total >= 5]
    shares = [(counts[token], expected[token] * total) for token in common]
    rest = total - sum(count for count, _ in shares), total - sum(share for _, share in shares)
    if rest[1] >= 5:
        shares.append(rest)
    statistic = sum((count - share) ** 2 / share for count, share in shares)
    degrees = max(len(shares) - 1, 1)
    return (statistic - degrees) / math.sqrt(2 * degrees)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_noise_is_splitmix64_in_wrapping_arithmetic(seed: int, position: int) -> None:
    (noise,) = uniform(numpy.array([seed], numpy.uint64), numpy.array([position], numpy.uint64))
    assert noise == oracle_uniform(seed, position)
    assert 0 <= noise < 1


@pytest.mark.parametrize("changes", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str)
def test_equals_at_the_border_of_a_filter_all_stay(changes: dict[str, float]) -> None:
    params = SamplingParams(**changes)  # type: ignore[arg-type]
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).expand(200, -1)
    rows = [make_row(params, [1], [], seed) for seed in range(200)]
    assert set(sample(logits, rows).tolist()) == {0, 2, 3}


def test_a_tiny_temperature_is_greedy_and_a_large_bias_decides() -> None:
    logits = torch.randn(VOCAB).mul(20).tolist()
    best = max(range(VOCAB), key=logits.__getitem__)
    for temperature in (0, 1e-30, 1e-6):
        params = SamplingParams(temperature=temperature)
        assert sample_alone(logits, make_row(params, [1], [])) == best
    params = SamplingParams(logit_bias={4: 100}, temperature=0)
    assert sample_alone(logits, make_row(params, [1], [])) == 4


def test_end_tokens_are_barred_until_min_tokens() -> None:
    logits = [0.0] * VOCAB
    logits[3], logits[5], logits[8] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0, min_tokens=2)
    chosen = [sample_alone(logits, make_row(params, [1], [1] * n)) for n in range(4)]
    assert chosen == [8, 8, 3, 3]


def test_sequences_of_one_seed_have_streams_of_their_own() -> None:
    assert sequence_seed(5, 0) == sequence_seed(5, 0)
    assert len({sequence_seed(seed, index) for seed in range(20) for index in range(20)}) == 400
    assert sequence_seed(None, 0) != sequence_seed(None, 0)


def test_logprobs_are_those_of_the_unchanged_distribution() -> None:
    logits = 3 * torch.randn(5, VOCAB)
    token_ids = torch.tensor([0, 3, 5, 7, 9])
    exact = logits.double().log_softmax(-1)
    for row, score in enumerate(Scores.of(logits, token_ids, 4).entries()):
        ordered = exact[row].sort(descending=True)
        token = int(token_ids[row])
        assert score.token_id == token
        assert score.logprob == pytest.approx(exact[row, token].item(), abs=1e-5)
        assert score.rank == ordered.indices.tolist().index(token) + 1
        assert [t for t, _ in score.top] == ordered.indices[:4].tolist()
        assert [x for _, x in score.top] == pytest.approx(ordered.values[:4].tolist(), abs=1e-5)
    assert next(Scores.of(logits[:1], token_ids[:1], 0).entries()).top == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", None),
        ("seed", 2**63),
        ("n", 0),
        ("n", True),
        ("stop", ("a", "")),
        ("stop_token_ids", (-1,)),
        ("logprobs", -1),
        ("prompt_logprobs", "all"),
        ("min_tokens", 300),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {"a": 1.0}),
    ],
)
def test_a_bad_parameter_is_one_error_that_names_it(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
