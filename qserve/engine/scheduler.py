"""Who runs in the next step. No torch.

`schedule` plans a step without knowing the tokens that steps still under way will sample; `commit`
takes those tokens later. Both may interleave, so that one step can be planned while another runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from qserve.engine.block_pool import EMPTY_PREFIX, BlockPool
from qserve.engine.request import FinishReason, RequestError
from qserve.engine.sequence import Sequence, SequenceStatus


class ScheduledChunk(NamedTuple):
    """Tokens [start, start + length) of a sequence, to be computed in one step.

    samples: the chunk ends with the sequence's last token, so the step samples the next one.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class StepPlan:
    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @cached_property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that gain a token, in the order of the sampled rows."""
        return tuple(chunk.sequence for chunk in self.chunks if chunk.samples)


class Scheduler:
    """Continuous batching: every step mixes all running decodes with chunks of prompts.

    First come, first served: the pages for all of a prompt are taken on admission, and no one is
    admitted past one who waits, nor while a prompt is still cut by the budget. So at most one
    prompt is unfinished at a time, it is the last of those that run, and no decode ever waits for
    it. When a running sequence finds no page for its next token, the latest arrival gives up its
    pages and recomputes them later, so the earliest always advances: no one starves, and nothing
    deadlocks, since every sequence admitted fits the cache when it is alone.

    Neither a cut nor a prefix hit leaves a single token of a prompt to a chunk of its own. Single
    tokens go through the kernels of decodes, which round otherwise, so that a text would depend on
    its chunks; and these kernels fetch older pages before a step writes its own, which a sequence
    that has just been admitted may share.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_sequences: int,
        max_batched_tokens: int,
        max_model_len: int,
        prefix_caching: bool = True,
    ) -> None:
        self._pool = pool
        self._max_num_sequences = max_num_sequences
        self._max_batched_tokens = max_batched_tokens
        self._prefix_caching = prefix_caching
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival
        self.max_length = min(max_model_len, pool.num_pages * pool.page_size + 1)
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def check_fits(self, num_prompt_tokens: int) -> None:
        """Raise RequestError if a prompt and one token of output can never fit."""
        if num_prompt_tokens < 1:
            raise RequestError("the prompt is empty")
        if num_prompt_tokens + 1 > self.max_length:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens; with one token of output, at most "
                f"{self.max_length - 1} fit the model and the cache"
            )

    def add(self, sequence: Sequence) -> None:
        self.check_fits(sequence.num_prompt_tokens)
        self._waiting.append(sequence)

    def schedule(self) -> StepPlan:
        """Plan the next step, as if every step planned before it had run."""
        chunks: list[ScheduledChunk] = []
        budget = self._max_batched_tokens
        self._grow_running()
        for sequence in self._running:
            budget = self._plan_chunk(sequence, budget, chunks)
        while budget > 0 and self._admit_next(budget):
            budget = self._plan_chunk(self._running[-1], budget, chunks)
        return StepPlan(tuple(chunks))

    def commit(self, plan: StepPlan, token_ids: Iterable[int]) -> list[Sequence]:
        """Take the tokens a step sampled, in the order of `plan.sampled`.

        Returns the sequences that gained one: not those that ended while the step was under way.
        """
        gained = []
        for sequence, token_id in zip(plan.sampled, token_ids, strict=True):
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.append(token_id)
            gained.append(sequence)
            if sequence.finish_reason is not None:
                self._retire(sequence)
        return gained

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence from outside, at any time; one that has already ended stays as it is."""
        if sequence.status is not SequenceStatus.FINISHED:
            sequence.finish_reason = reason
            self._retire(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the running sequences explain every page that is in use."""
        assert not any(sequence.pages for sequence in self._waiting), "one who waits holds pages"
        self._pool.check_integrity([sequence.pages for sequence in self._running])

    def _plan_chunk(self, sequence: Sequence, budget: int, chunks: list[ScheduledChunk]) -> int:
        """Append the sequence's next chunk, if any; return what others may have of the budget:
        nothing, if it is cut."""
        wanted = 0 if sequence.awaits_token else sequence.num_uncomputed_tokens
        length = self._chunk_length(wanted, budget)
        if length > 0:
            start = sequence.num_computed_tokens
            samples = start + length == sequence.num_tokens
            chunks.append(ScheduledChunk(sequence, start, length, samples))
            sequence.num_computed_tokens += length
            sequence.num_pending_tokens += samples
            self._publish(sequence)
        return budget - length if length == wanted else 0

    def _chunk_length(self, wanted: int, budget: int) -> int:
        """How many of the tokens wanted are computed in this step.

        A cut neither takes nor leaves a single one, unless a step can have no more than two.
        """
        if wanted <= budget:
            return wanted
        length = budget - (wanted == budget + 1)
        if length > 1:
            return length
        return budget if budget == self._max_batched_tokens else 0

    def _grow_running(self) -> None:
        """Give running sequences pages for their next token, at the cost of the latest arrivals."""
        for sequence in tuple(self._running):
            while sequence.status is SequenceStatus.RUNNING and self._num_missing_pages(sequence):
                if self._pool.num_free:
                    sequence.pages.append(self._pool.allocate())
                else:
                    self._preempt_latest()

    def _num_missing_pages(self, sequence: Sequence) -> int:
        return self._pool.pages_for(sequence.num_tokens_to_hold) - len(sequence.pages)

    def _admit_next(self, budget: int) -> bool:
        """Move the first who waits to the running, with pages for all its tokens, if it can start."""
        if not self._waiting or len(self._running) == self._max_num_sequences:
            return False
        sequence = self._waiting[0]
        self._take_cached_pages(sequence)
        if not self._can_start(sequence, budget):
            self._release_pages(sequence)
            return False
        for _ in range(self._num_missing_pages(sequence)):
            sequence.pages.append(self._pool.allocate())
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        self._running.append(self._waiting.popleft())
        return True

    def _can_start(self, sequence: Sequence, budget: int) -> bool:
        has_pages = self._num_missing_pages(sequence) <= self._pool.num_free
        return has_pages and self._chunk_length(sequence.num_uncomputed_tokens, budget) > 0

    def _take_cached_pages(self, sequence: Sequence) -> None:
        """Start from pages that hold the sequence's beginning, all but two of its tokens at
        most."""
        if not self._prefix_caching or sequence.needs_prompt_logprobs:
            return
        limit = max(sequence.num_tokens_to_hold - 2, 0) // self._pool.page_size
        matched = self._pool.match(sequence.token_ids, limit)
        sequence.pages = [cached.page for cached in matched]
        self._pool.acquire(sequence.pages)
        sequence.num_published_pages = len(matched)
        sequence.num_computed_tokens = len(matched) * self._pool.page_size
        sequence.prefix = matched[-1].prefix if matched else EMPTY_PREFIX

    def _publish(self, sequence: Sequence) -> None:
        """Let others use the full pages of a chunk, from the step that writes them on.

        A step writes all its keys and values of a layer before it reads any, so that even chunks of
        the same step can share them: that is how the sequences of one request come to share a
        prompt.
        """
        if not self._prefix_caching:
            return
        known = min(sequence.num_computed_tokens, len(sequence.token_ids))
        for index in range(sequence.num_published_pages, known // self._pool.page_size):
            page = sequence.pages[index]
            sequence.prefix = self._pool.publish(page, sequence.prefix, sequence.token_ids, index)
            sequence.num_published_pages = index + 1

    def _preempt_latest(self) -> None:
        sequence = self._running.pop()
        self._release_pages(sequence)
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _retire(self, sequence: Sequence) -> None:
        queue = self._running if sequence.status is SequenceStatus.RUNNING else self._waiting
        queue.remove(sequence)
        self._release_pages(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _release_pages(self, sequence: Sequence) -> None:
        """Give the pages back, the end of the text first, so that beginnings stay cached
        longest."""
        self._pool.release(reversed(sequence.pages))
        sequence.pages = []
        sequence.num_computed_tokens = 0
        sequence.num_published_pages = 0
        sequence.prefix = EMPTY_PREFIX
