"""The scheduler against a simulated device: right tokens, exact pages, no starvation, any overlap.

The simulated device writes, for every computed token, the whole text up to it into its slot, and
reads all slots back before it "samples". A stale, missing or foreign page therefore fails the test.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.engine.block_pool import BlockPool
from qserve.engine.grammar import TokenGuide
from qserve.engine.request import FinishReason, RequestError, SamplingParams
from qserve.engine.scheduler import Scheduler, StepPlan
from qserve.engine.sequence import Sequence, SequenceStatus

PAGE_SIZE = 4
END_TOKEN = 0


def next_token(text: tuple[int, ...]) -> int:
    """A deterministic model: any token, sometimes the end."""
    return random.Random(hash(text)).randrange(12)


def expected_output(prompt: list[int], max_length: int) -> list[int]:
    text = list(prompt)
    while len(text) < max_length:
        text.append(next_token(tuple(text)))
        if text[-1] == END_TOKEN:
            break
    return text[len(prompt) :]


@dataclass
class Device:
    """Runs plans in order; keeps sampled tokens to itself until they are asked for."""

    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)
    texts: dict[Sequence, list[int]] = field(default_factory=dict)

    def run(self, plan: StepPlan) -> list[int]:
        self.check_prefetch(plan)
        for chunk in plan.chunks:
            assert chunk.start + chunk.length < chunk.sequence.max_length
            text = self.texts.setdefault(chunk.sequence, list(chunk.sequence.token_ids))
            assert chunk.sequence.guide is None or text == chunk.sequence.token_ids
            for position in range(chunk.start, chunk.start + chunk.length):
                self.slots[self.slot(chunk.sequence, position)] = tuple(text[: position + 1])
        return [self.sample(sequence) for sequence in plan.sampled]

    def check_prefetch(self, plan: StepPlan) -> None:
        """A chunk of one token fetches all pages but its newest before the step writes any."""
        written = {
            chunk.sequence.pages[position // PAGE_SIZE]
            for chunk in plan.chunks
            for position in range(chunk.start, chunk.end)
        }
        for chunk in plan.chunks:
            if chunk.length == 1:
                assert written.isdisjoint(chunk.sequence.pages[: chunk.start // PAGE_SIZE])

    def sample(self, sequence: Sequence) -> int:
        text = self.texts[sequence]
        for position in range(len(text)):
            assert self.slots[self.slot(sequence, position)] == tuple(text[: position + 1])
        text.append(next_token(tuple(text)))
        return text[-1]

    @staticmethod
    def slot(sequence: Sequence, position: int) -> int:
        return sequence.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE


def make_scheduler(num_pages: int = 16, max_model_len: int = 10**6, **limits: int) -> Scheduler:
    defaults = {"max_num_sequences": 4, "max_batched_tokens": 8}
    return Scheduler(
        BlockPool(num_pages, PAGE_SIZE), max_model_len=max_model_len, **(defaults | limits)
    )


class AnyText(TokenGuide):
    """Allows everything."""

    def __init__(self) -> None:
        pass

    def accept(self, token_id: int) -> bool:
        return True


def make_sequence(
    scheduler: Scheduler, prompt: list[int], max_tokens: int = 8, guided: bool = False
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    max_length = min(len(prompt) + max_tokens, scheduler.max_length)
    guide = AnyText() if guided else None
    return Sequence("r", 0, params, list(prompt), 0, max_length, frozenset({END_TOKEN}), guide)


def check_plan(scheduler: Scheduler, plan: StepPlan, limits: dict[str, int]) -> None:
    assert plan.chunks
    assert plan.num_tokens <= limits["max_batched_tokens"]
    assert scheduler.num_running <= limits["max_num_sequences"]
    assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
    assert all(chunk.length > 0 for chunk in plan.chunks)


def check_chunks(plan: StepPlan) -> None:
    """Single tokens are what was generated, or prompts as short as that."""
    for chunk in plan.chunks:
        is_of_prompt = chunk.start < chunk.sequence.num_prompt_tokens
        assert chunk.length > 1 or not is_of_prompt or chunk.sequence.num_prompt_tokens == 1


prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    prompts=prompts,
    num_pages=st.integers(6, 20),
    max_num_sequences=st.integers(1, 5),
    extra_budget=st.integers(0, 24),
    max_tokens=st.integers(1, 20),
    prefix_caching=st.booleans(),
    depth=st.integers(1, 3),
    arrival_steps=st.lists(st.integers(0, 40), min_size=8, max_size=8),
    aborts=st.dictionaries(st.integers(0, 60), st.integers(0, 7), max_size=4),
    guided=st.sets(st.integers(0, 7)),
)
def test_any_schedule_yields_the_tokens_of_each_sequence_alone(
    prompts: list[list[int]],
    num_pages: int,
    max_num_sequences: int,
    extra_budget: int,
    max_tokens: int,
    prefix_caching: bool,
    depth: int,
    arrival_steps: list[int],
    aborts: dict[int, int],
    guided: set[int],
) -> None:
    """`depth` steps are under way at once; requests arrive and are aborted at any time.

    Those that a grammar guides never have a token under way that is not committed.
    """
    limits = {
        "max_num_sequences": max_num_sequences,
        "max_batched_tokens": max_num_sequences + extra_budget,
    }
    scheduler = make_scheduler(num_pages, prefix_caching=prefix_caching, **limits)
    device = Device()
    sequences = [
        make_sequence(scheduler, prompt, max_tokens, index in guided)
        for index, prompt in enumerate(prompts)
    ]
    under_way: deque[tuple[StepPlan, list[int]]] = deque()
    for step in range(2000):
        for sequence, arrival_step in zip(sequences, arrival_steps, strict=False):
            if step == arrival_step:
                scheduler.add(sequence)
        abort(scheduler, sequences[: aborts.get(step, -1) + 1][-1:])
        if scheduler.num_running + scheduler.num_waiting:
            plan = scheduler.schedule()
            if depth == 1:
                check_plan(scheduler, plan, limits)
            if limits["max_batched_tokens"] > 2:
                check_chunks(plan)
            under_way.append((plan, device.run(plan)))
        scheduler.check_integrity()
        while len(under_way) >= depth or (under_way and not scheduler.num_running):
            scheduler.commit(*under_way.popleft())
        if all(sequence.status is SequenceStatus.FINISHED for sequence in sequences):
            break
    scheduler.check_integrity()
    assert scheduler._pool.num_used == 0
    for sequence in sequences:
        check_output(sequence)


def abort(scheduler: Scheduler, victims: list[Sequence]) -> None:
    for victim in victims:
        if victim in scheduler._running or victim in scheduler._waiting:
            scheduler.finish(victim, FinishReason.ABORT)


def check_output(sequence: Sequence) -> None:
    prompt = sequence.token_ids[: sequence.num_prompt_tokens]
    output = sequence.token_ids[sequence.num_prompt_tokens :]
    expected = expected_output(prompt, sequence.max_length)
    aborted = sequence.finish_reason is FinishReason.ABORT
    assert sequence.status is SequenceStatus.FINISHED
    assert output == (expected[: len(output)] if aborted else expected)


@settings(max_examples=60, deadline=None)
@given(prompts=prompts, num_pages=st.integers(6, 12), budget=st.integers(4, 16))
def test_the_earliest_unfinished_sequence_advances_in_every_step(
    prompts: list[list[int]], num_pages: int, budget: int
) -> None:
    scheduler, device = make_scheduler(num_pages, max_batched_tokens=budget), Device()
    sequences = [make_sequence(scheduler, prompt, 12) for prompt in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.num_running + scheduler.num_waiting:
        decoding = [s for s in scheduler._running if s.num_uncomputed_tokens == 1]
        plan = scheduler.schedule()
        planned = {chunk.sequence for chunk in plan.chunks}
        still_decoding = {s for s in decoding if s.status is SequenceStatus.RUNNING}
        assert next(s for s in sequences if s.status is not SequenceStatus.FINISHED) in planned
        assert still_decoding <= planned
        scheduler.commit(plan, device.run(plan))


def test_decodes_go_with_prompt_chunks_under_the_budget() -> None:
    scheduler, device = make_scheduler(max_batched_tokens=6), Device()
    scheduler.add(make_sequence(scheduler, [1, 2, 3]))
    scheduler.commit(plan := scheduler.schedule(), device.run(plan))
    scheduler.add(make_sequence(scheduler, list(range(1, 12))))
    shapes = []
    for _ in range(3):
        scheduler.commit(plan := scheduler.schedule(), device.run(plan))
        shapes.append([(chunk.start, chunk.length, chunk.samples) for chunk in plan.chunks])
    assert shapes == [
        [(3, 1, True), (0, 5, False)],
        [(4, 1, True), (5, 4, False)],
        [(5, 1, True), (9, 2, True)],
    ]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((5, 3, 1), [[(0, 5)], [(5, 1), (0, 3), (0, 1)]]),
        ((7, 1), [[(0, 5)], [(5, 2), (0, 1)]]),
    ],
    ids=["it would start with one", "one would be left"],
)
def test_others_wait_while_a_prompt_leaves_a_token_of_the_budget(
    lengths: tuple[int, ...], expected: list[list[tuple[int, int]]]
) -> None:
    scheduler, device = make_scheduler(max_batched_tokens=6), Device()
    for length in lengths:
        scheduler.add(make_sequence(scheduler, list(range(1, 1 + length))))
    shapes = []
    for _ in expected:
        scheduler.commit(plan := scheduler.schedule(), device.run(plan))
        shapes.append([(chunk.start, chunk.length) for chunk in plan.chunks])
    assert shapes == expected


@pytest.mark.parametrize("budget", [1, 2])
def test_a_budget_of_single_tokens_still_computes_prompts(budget: int) -> None:
    scheduler = make_scheduler(max_num_sequences=budget, max_batched_tokens=budget)
    device, sequences = Device(), []
    for length in range(1, 6):
        sequences.append(make_sequence(scheduler, list(range(1, 1 + length))))
        scheduler.add(sequences[-1])
    while scheduler.num_running + scheduler.num_waiting:
        scheduler.commit(plan := scheduler.schedule(), device.run(plan))
    for sequence in sequences:
        check_output(sequence)


def test_sequences_of_one_prompt_share_its_full_pages_within_a_single_step() -> None:
    scheduler, device = make_scheduler(max_batched_tokens=64), Device()
    sequences = [make_sequence(scheduler, list(range(1, 11))) for _ in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert [(chunk.start, chunk.length) for chunk in plan.chunks] == [(0, 10), (8, 2), (8, 2)]
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 8, 8]
    assert len({tuple(sequence.pages[:2]) for sequence in sequences}) == 1
    scheduler.commit(plan, device.run(plan))
    assert scheduler._pool.num_used == 2 + 3


@pytest.mark.parametrize(("length", "hit"), [(8, 4), (9, 4), (10, 8)])
def test_two_prompt_tokens_are_computed_even_if_all_pages_are_cached(length: int, hit: int) -> None:
    scheduler, device = make_scheduler(max_batched_tokens=16), Device()
    for expected in ((0, length), (hit, length - hit)):
        scheduler.add(sequence := make_sequence(scheduler, list(range(1, 1 + length)), 1))
        scheduler.commit(plan := scheduler.schedule(), device.run(plan))
        assert (plan.chunks[0].start, plan.chunks[0].length) == expected
        assert sequence.finish_reason is FinishReason.LENGTH


def test_a_finished_text_loses_its_end_before_its_beginning() -> None:
    scheduler, device = make_scheduler(num_pages=3), Device()
    for prompt, cached in (([1] * 9, 0), ([2] * 7, 0), ([1] * 9, 4)):
        scheduler.add(sequence := make_sequence(scheduler, prompt, 1))
        while sequence.status is not SequenceStatus.FINISHED:
            scheduler.commit(plan := scheduler.schedule(), device.run(plan))
        assert sequence.num_cached_tokens == cached


def test_the_latest_arrival_is_preempted_and_comes_back_first() -> None:
    scheduler, device = make_scheduler(num_pages=4, max_batched_tokens=16), Device()
    first, second, third = (make_sequence(scheduler, [n] * 7, 9) for n in (1, 2, 3))
    for sequence in (first, second, third):
        sequence.end_token_ids = frozenset()
        scheduler.add(sequence)
    while not scheduler.num_preemptions:
        scheduler.commit(plan := scheduler.schedule(), device.run(plan))
    assert (first.status, second.status) == (SequenceStatus.RUNNING, SequenceStatus.WAITING)
    assert second.pages == [] and second.num_output_tokens > 0
    assert list(scheduler._waiting) == [second, third]


def test_what_can_never_fit_is_refused_and_what_fits_alone_ends_by_length() -> None:
    scheduler, device = make_scheduler(num_pages=2), Device()
    with pytest.raises(RequestError, match="9 tokens"):
        scheduler.add(make_sequence(scheduler, [1] * 9))
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(make_sequence(scheduler, []))
    assert scheduler.num_waiting == 0
    sequence = make_sequence(scheduler, [1] * 8, 100)
    sequence.end_token_ids = frozenset()
    scheduler.add(sequence)
    scheduler.commit(plan := scheduler.schedule(), device.run(plan))
    assert (sequence.finish_reason, len(sequence.token_ids)) == (FinishReason.LENGTH, 9)
    with pytest.raises(RequestError, match="at most 4 fit"):
        make_scheduler(max_model_len=5).add(make_sequence(scheduler, [1] * 5))


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    scheduler, device = make_scheduler(), Device()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for _ in range(2):
        scheduler.add(Sequence("r", 0, params, list(range(1, 9)), 0, 9))
        scheduler.commit(plan := scheduler.schedule(), device.run(plan))
        assert plan.chunks[0].length == 8
