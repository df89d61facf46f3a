"""The only place that knows text: prompts, incremental decoding, stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any, NamedTuple

from qserve.engine.request import RequestError

REPLACEMENT = "\ufffd"


NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer adds to any text.

    Raises RequestError for half of a surrogate pair, which JSON can spell though it is no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("the prompt is no text: it holds an unpaired surrogate") from error
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] = NO_SETTINGS,
) -> list[int]:
    """Token ids of a conversation, up to where the assistant's answer begins.

    messages: each with "role" and "content". tools: what the assistant may call, as the OpenAI API
    describes it. settings: variables that the template knows besides, such as Qwen3's
    `enable_thinking`. Raises RequestError if the model has no chat template, or the template refuses
    them or makes no text of them.
    """
    if not tokenizer.chat_template:
        raise RequestError("the model has no chat template")
    reserved = {"messages", *signature(tokenizer.apply_chat_template).parameters}
    if taken := sorted(reserved & settings.keys()):
        raise RequestError(f"chat_template_kwargs holds {taken[0]!r}, which is not its to set")
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **settings
        )
    except Exception as error:  # templates raise whatever they like
        raise RequestError(f"the chat template refuses the messages: {error}") from error
    return encode(tokenizer, text, add_special_tokens=False)


class Detokenizer:
    """Token ids in, text out; the parts join to the text of all tokens decoded at once.

    A token is decoded together with those since the last clean cut between characters, because
    byte-level tokens split characters and others depend on their neighbours. While the text ends in
    a replacement character, more bytes may be due, and nothing is given out.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._decode = _decoding(tokenizer, skip_special_tokens)
        self._context: list[int] = []  # given out, but the next token's neighbours
        self._context_text = ""
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that became final with this token."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._context_text):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is left at the end, half characters included."""
        return self._take(self._decode(self._context + self._pending)) if self._pending else ""

    def _take(self, text: str) -> str:
        new_text = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return new_text


def _decoding(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """Token ids to text, by the tokenizer's own core where it has one: that takes a tenth of the time."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        return partial(core.decode, skip_special_tokens=skip_special_tokens)
    return partial(
        tokenizer.decode,
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )


def num_begun(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of the strings may go on from."""
    longest = min(len(text), max(map(len, strings), default=1) - 1)
    lengths = range(longest, 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in strings)), 0)


class StopMatcher:
    """Finds stop strings in text that comes in pieces; the pieces' borders make no difference.

    Of all occurrences, the one that ends first counts, and of those the longest.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that is final, the stop string found or None); nothing may be fed after a stop."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        if found:
            end, _, stop = min(found)
            return text[: end - len(stop)], stop
        cut = len(text) - num_begun(text, self._stops)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """The text held back, once no more is to come."""
        held, self._held = self._held, ""
        return held


class TextDelta(NamedTuple):
    text: str
    stop: str | None


class TextStream:
    """The text of one sequence, from its tokens."""

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._matcher = StopMatcher(stops)
        self._num_unmatched = min_tokens

    def feed(self, token_id: int) -> TextDelta:
        """What a token adds; stop strings count from the first token after `min_tokens` on."""
        text = self._detokenizer.feed(token_id)
        if self._num_unmatched:
            self._num_unmatched -= 1
            return TextDelta(text, None)
        return TextDelta(*self._matcher.feed(text))

    def flush(self) -> TextDelta:
        """What is left once the last token is fed."""
        text, stop = self._matcher.feed(self._detokenizer.flush())
        return TextDelta(text if stop else text + self._matcher.flush(), stop)
