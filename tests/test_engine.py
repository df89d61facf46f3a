"""The engine's tokens equal those of naive generation, whatever else runs; and no page is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from engine_helpers import (
    AHEAD,
    MAX_TOKENS,
    PARAMS,
    PLAIN,
    PROMPTS,
    REPLAYED,
    TOKENIZER,
    collect,
    do_twice,
    expected_tokens,
    make_engine,
    run_all,
    run_one,
    tiny_decoder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qserve import SamplingParams
from qserve.engine.device import DevicePolicy
from qserve.engine.llm import Completion
from qserve.engine.request import FinishReason, RequestError


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=7
    ),
    aborts=st.dictionaries(st.integers(0, 20), st.integers(0, 6), max_size=3),
    max_num_sequences=st.integers(1, 5),
    extra_budget=st.integers(0, 200),
    num_pages=st.integers(3, 12),
    prefix_caching=st.booleans(),
    policy=st.sampled_from([PLAIN, AHEAD, REPLAYED]),
)
def test_tokens_equal_naive_generation_in_any_schedule(
    requests: list[tuple[int, int, int]],
    aborts: dict[int, int],
    max_num_sequences: int,
    extra_budget: int,
    num_pages: int,
    prefix_caching: bool,
    policy: DevicePolicy,
) -> None:
    """requests: (prompt, params, step of arrival). aborts: step -> request."""
    engine = make_engine(
        policy,
        max_num_sequences=max_num_sequences,
        max_batched_tokens=max_num_sequences + extra_budget,
        num_pages=num_pages,
        enable_prefix_caching=prefix_caching,
    )
    results: dict[str, dict[int, Completion]] = {}
    for step in range(max(*aborts, 12, 12) + 1):
        for number, (prompt, params, arrival) in enumerate(requests):
            if arrival == step:
                engine.add_request(str(number), PROMPTS[prompt], PARAMS[params])
        engine.abort(str(aborts.get(step)))
        collect(engine, results)
    while engine.has_unfinished:
        collect(engine, results)
    assert engine.stats.pages_used == 0
    for number, (prompt, params, _) in enumerate(requests):
        expected = expected_tokens(prompt, params)
        completion = results.get(str(number), {}).get(0, Completion())
        aborted = number in aborts.values() and completion.finish_reason is None
        assert completion.token_ids == (
            expected[: len(completion.token_ids)] if aborted else expected
        )


def texts_with_stops() -> tuple[str, ...]:
    """Strings that some of the texts come to, across the borders of tokens."""
    texts = [TOKENIZER.decode(expected_tokens(prompt, 0)) for prompt in range(len(PROMPTS))]
    return tuple(text[3:5] for text in texts if len(text) > 5)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_pages=st.integers(8, 16))
def test_steps_ahead_change_no_part_of_an_output(data: st.DataObject, num_pages: int) -> None:
    params = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0, 1]),
        seed=st.integers(0, 9),
        n=st.integers(1, 3),
        stop=st.lists(st.sampled_from(texts_with_stops()), max_size=2).map(tuple),
        stop_token_ids=st.sampled_from([(), tuple(range(3, 320, 5))]),
        frequency_penalty=st.sampled_from([0.0, 1.5]),
        logprobs=st.sampled_from([None, 0, 3]),
        prompt_logprobs=st.sampled_from([None, None, 2]),
        min_tokens=st.integers(0, 1),
    )
    requests = data.draw(st.lists(st.tuples(st.sampled_from(PROMPTS), params), max_size=5))
    results = []
    for policy in (PLAIN, REPLAYED):
        engine = make_engine(policy, num_pages=num_pages)
        for number, (prompt, chosen) in enumerate(requests):
            engine.add_request(str(number), prompt, chosen)
        completions: dict[str, dict[int, Completion]] = {}
        prompt_scores: dict[str, object] = {}
        while engine.has_unfinished:
            collect(engine, completions, prompt_scores)
        results.append((completions, prompt_scores, engine.stats.generated_tokens))
    assert results[0] == results[1]


@pytest.mark.parametrize(("policy", "gained"), [(PLAIN, [1, 1, 1, 0]), (AHEAD, [0, 1, 1, 1])])
def test_a_step_gives_what_it_gained_or_what_the_one_before_did(
    policy: DevicePolicy, gained: list[int]
) -> None:
    engine = make_engine(policy)
    engine.add_request("three", PROMPTS[1], replace(PARAMS[0], max_tokens=3))
    assert [len(engine.step()) for _ in gained] == gained


def test_tokens_do_not_depend_on_the_chunk_size() -> None:
    params = replace(PARAMS[2], max_tokens=3)
    for max_batched_tokens in [*range(1, 67), 128, 1000]:
        engine = make_engine(max_num_sequences=1, max_batched_tokens=max_batched_tokens)
        completion = run_one(engine, PROMPTS[3], params)
        assert completion.token_ids == expected_tokens(3, 2)[:3], max_batched_tokens


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_tokens_survive_preemption_in_every_cache_format(kv_bits: int) -> None:
    engine = make_engine(
        kv_bits=kv_bits, num_pages=4, max_batched_tokens=256, enable_prefix_caching=False
    )
    choices = [(2, 0), (2, 2), (2, 3), (1, 1)]
    for number, (prompt, params) in enumerate(choices):
        engine.add_request(str(number), PROMPTS[prompt], PARAMS[params])
    results = run_all(engine)
    assert engine.stats.preemptions > 0
    for number, (prompt, params) in enumerate(choices):
        assert results[str(number)][0].token_ids == expected_tokens(prompt, params, kv_bits)


def test_steps_over_pages_of_16_bits_are_not_recorded() -> None:
    recorded = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return do_twice(work)

    for kv_bits, count in ((16, 0), (4, 3)):
        engine = make_engine(replace(AHEAD, capture=record), kv_bits=kv_bits, max_num_sequences=4)
        assert len(recorded) == count
        assert run_one(engine, PROMPTS[1], PARAMS[2]).token_ids == expected_tokens(1, 2, kv_bits)


def test_a_prefix_hit_changes_what_is_computed_but_not_the_tokens() -> None:
    engine = make_engine()
    cached = []
    for number, prompt in enumerate((4, 4, 5, 3, 2)):
        engine.add_request(str(number), PROMPTS[prompt], PARAMS[3])
        tokens, request_cached = [], 0
        while engine.has_unfinished:
            for output in engine.step():
                tokens += output.outputs[0].token_ids
                request_cached = output.cached_tokens
        cached.append(request_cached)
        assert tokens == expected_tokens(prompt, 3)
    assert cached == [0, 128, 64, 0, 0]
    assert engine.stats.cached_tokens == 192


@pytest.mark.parametrize("policy", [PLAIN, AHEAD], ids=["plain", "ahead"])
def test_what_was_generated_is_found_again(policy: DevicePolicy) -> None:
    engine = make_engine(policy)
    first = run_one(engine, PROMPTS[1], replace(PARAMS[0], max_tokens=100))
    run_one(engine, [*PROMPTS[1], *first.token_ids], PARAMS[0])
    assert engine.stats.cached_tokens == 128


def test_what_a_preempted_sequence_finds_again_was_not_cached_for_it() -> None:
    engine = make_engine(num_pages=5, max_batched_tokens=256)
    cached = set()
    for number in range(2):
        prompt = [number] * 100
        engine.add_request(str(number), prompt, replace(PARAMS[0], max_tokens=40))
    while engine.has_unfinished:
        cached |= {output.cached_tokens for output in engine.step()}
    assert engine.stats.preemptions == 1 and cached == {0}


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_sequences_of_one_request_share_its_prompt_and_draw_from_their_own_streams(
    prompt_logprobs: int | None,
) -> None:
    engine = make_engine(max_batched_tokens=512)
    params = replace(PARAMS[2], n=4, prompt_logprobs=prompt_logprobs)
    engine.add_request("n", PROMPTS[4], params)
    results: dict[str, dict[int, Completion]] = {}
    collect(engine, results)
    assert engine.stats.pages_used == 2 + 4
    while engine.has_unfinished:
        collect(engine, results)
    tokens = [results["n"][index].token_ids for index in range(4)]
    assert tokens == [expected_tokens(4, 2, 4, index) for index in range(4)]
    assert len(set(map(tuple, tokens))) == 4


@pytest.mark.parametrize("max_batched_tokens", [4, 7, 64])
def test_prompt_logprobs_are_what_each_prefix_would_predict(max_batched_tokens: int) -> None:
    prompt, vocab_size = PROMPTS[1][:18], tiny_decoder().config.vocab_size
    engine = make_engine(max_batched_tokens=max_batched_tokens)
    params = SamplingParams(max_tokens=2, prompt_logprobs=3, temperature=0, ignore_eos=True)
    engine.add_request("p", prompt, params)
    scores = []
    while engine.has_unfinished:
        scores += [output.prompt_logprobs for output in engine.step()]
    assert scores[1] is None
    assert scores[0] is not None and len(scores[0]) == len(prompt) and scores[0][0] is None
    for position, score in enumerate(scores[0][1:], start=1):
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=vocab_size)
        (predicted,) = run_one(make_engine(), prompt[:position], params).logprobs or ()
        assert score is not None and score.token_id == prompt[position]
        assert score.logprob == dict(predicted.top)[prompt[position]]
        assert score.top == predicted.top[:3]


def test_prompt_logprobs_come_once_though_sequences_begin_one_after_the_other() -> None:
    engine = make_engine(max_batched_tokens=64)
    engine.add_request("p", PROMPTS[1], SamplingParams(max_tokens=1, n=2, prompt_logprobs=0))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [len(output.outputs) for output in outputs] == [1, 1]
    assert [output.prompt_logprobs is None for output in outputs] == [False, True]


def test_min_tokens_bar_nothing_where_nothing_ends_the_text() -> None:
    params = replace(PARAMS[0], min_tokens=5)
    assert params.ignore_eos
    assert run_one(make_engine(), PROMPTS[1], params).token_ids == expected_tokens(1, 0)


def test_stop_strings_end_the_text_before_them() -> None:
    text = TOKENIZER.decode(expected_tokens(1, 0), skip_special_tokens=True)
    stop = text[3:5]
    completion = run_one(make_engine(), PROMPTS[1], replace(PARAMS[0], stop=("never", stop)))
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop)


def test_a_stop_string_that_the_last_token_completes_is_a_stop() -> None:
    *_, last = tokens = expected_tokens(1, 0)
    stop = TOKENIZER.decode(tokens)[-2:]
    assert len(tokens) == MAX_TOKENS and TOKENIZER.decode(tokens).count(stop) == 1
    completion = run_one(make_engine(), PROMPTS[1], replace(PARAMS[0], stop=(stop,)))
    assert completion.token_ids[-1] == last
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop)


def test_a_stop_token_ends_the_sequence_and_is_not_text() -> None:
    tokens = expected_tokens(1, 0)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    params = replace(PARAMS[0], stop_token_ids=(stop,), logprobs=1)
    completion = run_one(make_engine(), PROMPTS[1], params)
    cut = tokens.index(stop)
    assert completion.token_ids == tokens[: cut + 1]
    assert completion.text == TOKENIZER.decode(tokens[:cut], skip_special_tokens=True)
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop)
    assert [score.token_id for score in completion.logprobs or ()] == tokens[: cut + 1]


def test_length_ends_the_sequence_with_its_whole_text() -> None:
    completion = run_one(make_engine(), PROMPTS[1], PARAMS[0])
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.text == TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)
    endless = replace(PARAMS[0], max_tokens=None)
    limited = run_one(make_engine(max_model_len=50), PROMPTS[1], endless)
    assert len(limited.token_ids) == 50 - len(PROMPTS[1])
    full = run_one(make_engine(num_pages=1), PROMPTS[1], endless)
    assert len(full.token_ids) == 65 - len(PROMPTS[1])


def test_what_cannot_be_served_is_refused_and_disturbs_nothing() -> None:
    engine = make_engine(num_pages=2)
    engine.add_request("good", PROMPTS[1], PARAMS[2])
    engine.step()
    for request_id, prompt, params, message in (
        ("good", PROMPTS[0], PARAMS[0], "'good' is in use"),
        ("bad", [], PARAMS[0], "empty"),
        ("bad", [1] * 200, PARAMS[0], "200 tokens"),
        ("bad", [320], PARAMS[0], "prompt holds 320"),
        ("bad", ["a"], PARAMS[0], "prompt holds 'a'"),
        ("bad", [1], SamplingParams(logit_bias={999: 1.0}), "logit_bias holds 999"),
        ("bad", [1], SamplingParams(stop_token_ids=(320,)), "stop_token_ids holds 320"),
        ("bad", [1], SamplingParams(logprobs=321), "logprobs 321"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.add_request(request_id, prompt, params)  # type: ignore[arg-type]
    tokens = expected_tokens(1, 2)
    assert run_all(engine)["good"][0].token_ids == tokens[1:]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_drops_what_it_touched_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    engine = make_engine(max_batched_tokens=512)
    engine.add_request("lost", PROMPTS[4], PARAMS[0])

    def fail(batch: object) -> Tensor:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", fail)
        with pytest.raises(error):
            engine.step()
    assert not engine.has_unfinished and engine.stats.pages_used == 0
    assert run_one(engine, PROMPTS[4], PARAMS[0]).token_ids == expected_tokens(4, 0)
    assert engine.stats.cached_tokens == 0
