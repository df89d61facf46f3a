"""Structured output: which tokens a grammar allows next.

llguidance does the work: a parser per sequence over an automaton that all sequences of a grammar
share, with limits on what a grammar may cost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from qserve.engine.request import Grammar, GrammarKind, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MAX_GRAMMAR_LENGTH = 2**18
"""Characters of a grammar: compiling this much takes seconds at worst."""

MAX_CACHED_GRAMMARS = 128

MAX_MESSAGE_LENGTH = 300

_STACK_BYTES = 512 * 2**20
"""For a compiler that follows references by recursion: a grammar has room for a chain of 30,000 rules.
Memory is taken only as far as the stack is used."""

_stack_size = threading.Lock()

JSON_WHITESPACE = r"(\n[ \t]{0,12}| )?"
"""Between the parts of JSON: enough to indent, too little for a model to lose itself in."""


class TokenGuide:
    """What a grammar allows one sequence to go on with.

    end_token_ids: tokens that end the sequence, allowed only where the text is complete.
    """

    def __init__(self, matcher: LLMatcher, num_tokens: int, end_token_ids: Iterable[int]) -> None:
        self._matcher = matcher
        self._mask = numpy.zeros(-(-num_tokens // 32) * 4, dtype=numpy.uint8)
        self._ends = tuple(end_token_ids)

    def mask(self) -> NDArray[numpy.uint8]:
        """One bit per token, the lowest of a byte first, set if it may come next; valid until the
        next call. Where the text cannot go on, any token may come: `accept` refuses it."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._set_ends(self._matcher.is_accepting())
        if self._matcher.is_error() or not self._mask.any():
            self._mask.fill(255)
            self._set_ends(False)
        return self._mask

    def _set_ends(self, allowed: bool) -> None:
        for token in self._ends:
            bit = numpy.uint8(1 << token % 8)
            self._mask[token // 8] &= ~bit
            self._mask[token // 8] |= bit * allowed

    def accept(self, token_id: int) -> bool:
        """Take the next token, which ends nothing.

        False if the text cannot go on: the grammar turns out to cost too much, or wants a token that
        ends the sequence.
        """
        return bool(self._matcher.consume_token(token_id))


class GrammarCompiler:
    """Compiles grammars for one vocabulary, each once. Any thread may use it.

    num_tokens: of the model, which may have more than the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_tokens: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = max(num_tokens, len(tokenizer))
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled = lru_cache(MAX_CACHED_GRAMMARS)(self._compile)

    def check(self, grammar: Grammar) -> None:
        """Compile a grammar, so that `guide` need not; RequestError says why it cannot be used."""
        self._compiled(grammar)

    def guide(self, grammar: Grammar, end_token_ids: Iterable[int]) -> TokenGuide:
        """A guide for a new sequence. Raises RequestError as `check` does."""
        return TokenGuide(self._compiled(grammar).deep_copy(), self._num_tokens, end_token_ids)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher to copy, with what its first mask needs already worked out."""
        if len(grammar.text) > MAX_GRAMMAR_LENGTH:
            raise RequestError(
                f"{grammar.name} has {len(grammar.text)} characters, more than the "
                f"{MAX_GRAMMAR_LENGTH} that a grammar may have"
            )
        return _on_deep_stack(partial(self._compile_now, grammar))

    def _compile_now(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._vocabulary, _definition(grammar), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise RequestError(f"{grammar.name} cannot be used: {_reason(matcher)}")
        return matcher

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """Takes about a second to build for a large vocabulary."""
        from llguidance.hf import from_tokenizer

        if not self._eos_token_ids:
            raise RequestError("grammar needs a model with an end-of-text token")
        try:
            return from_tokenizer(
                self._tokenizer, n_vocab=self._num_tokens, eos_token=self._eos_token_ids
            )
        except ValueError as error:
            raise RequestError(
                f"grammar does not go with the model's tokenizer: {error}"
            ) from error


def _on_deep_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """Do work on a thread with a stack that no grammar overflows, which would end the process."""
    with ThreadPoolExecutor(1) as executor:
        with _stack_size:
            before = threading.stack_size(_STACK_BYTES)
            try:
                result = executor.submit(work)  # starts the thread
            finally:
                threading.stack_size(before)
        return result.result()


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher has failed, in one line."""
    reason = " ".join(matcher.get_error().split())
    return "no text fulfils it" if reason.startswith("NoExt") else reason[:MAX_MESSAGE_LENGTH]


def _definition(grammar: Grammar) -> str:
    """The grammar as llguidance writes it."""
    from llguidance import LLMatcher

    if grammar.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind is GrammarKind.LARK:
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        return LLMatcher.grammar_from_json_schema(
            grammar.text, overrides={"whitespace_pattern": JSON_WHITESPACE}
        )
    except ValueError as error:
        raise RequestError(f"{grammar.name} is no JSON schema: {error}") from error
