"""The state of one sequence while the engine works on it. No torch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from qserve.engine.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from qserve.engine.grammar import TokenGuide


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """Tokens, pages and progress of one sequence; only the scheduler moves it between states.

    token_ids: prompt and output so far.
    seed: of this sequence's noise. max_length: tokens at which it ends for want of room.
    end_token_ids: tokens that end it. guide: what its grammar allows next, if it has one.
    num_computed_tokens: leading tokens whose keys and values are in `pages`, or will be once the
        steps scheduled so far have run.
    num_pending_tokens: sampled by steps that are scheduled but not yet committed.
    num_published_pages, prefix: how far the prefix cache knows the pages, and under which identity.
    """

    request_id: str
    index: int
    params: SamplingParams
    token_ids: list[int]
    seed: int
    max_length: int
    end_token_ids: frozenset[int] = frozenset()
    guide: TokenGuide | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int | None = None
    num_published_pages: int = 0
    prefix: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, including those sampled but not yet committed."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_to_hold(self) -> int:
        """Tokens the pages must hold now; the very last token of a sequence is never computed."""
        return min(self.num_tokens, self.max_length - 1)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens_to_hold - self.num_computed_tokens

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether the prompt has to be computed in full, for the log probabilities of its
        tokens."""
        wanted = self.params.prompt_logprobs is not None and self.index == 0
        return wanted and self.num_output_tokens == 0

    @property
    def awaits_token(self) -> bool:
        """Whether its next step cannot be planned before the token under way is committed: what a
        grammar allows depends on it."""
        return self.guide is not None and self.num_pending_tokens > 0

    def append(self, token_id: int) -> None:
        """Take the token a step sampled, and note whether it ends the sequence."""
        self.token_ids.append(token_id)
        self.num_pending_tokens -= 1
        if token_id in self.end_token_ids:
            self.finish_reason = FinishReason.STOP
            self.stop_reason = token_id if token_id in self.params.stop_token_ids else None
        elif self.guide is not None and not self.guide.accept(token_id):
            self.finish_reason = FinishReason.ABORT
        elif len(self.token_ids) >= self.max_length:
            self.finish_reason = FinishReason.LENGTH


def sequence_seed(seed: int | None, index: int) -> int:
    """The seed of the `index`-th sequence of a request, in [0, 2^63); None draws one at random."""
    generator = random.SystemRandom() if seed is None else random.Random(f"{seed}/{index}")
    return generator.getrandbits(63)
