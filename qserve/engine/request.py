"""What a client asks for and what it gets back. Immutable values; no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple


class RequestError(ValueError):
    """A request that can never be served; the message names the offending field and value."""


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class GrammarKind(Enum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class Grammar:
    """What a generated text must be: JSON of a schema, a regular expression, or a Lark grammar.

    The dialects are llguidance's: regular expressions match all of the text, and know neither
    look-around nor references. name: what the client calls it, for messages.
    """

    kind: GrammarKind
    text: str
    name: str = field(default="grammar", compare=False)

    @classmethod
    def of_json(cls, schema: Mapping[str, Any] | bool, name: str = "grammar") -> Grammar:
        """JSON that fulfils a schema."""
        return cls(GrammarKind.JSON_SCHEMA, json.dumps(schema), name)

    @classmethod
    def of_choices(cls, choices: Iterable[str], name: str = "grammar") -> Grammar:
        """One of several texts."""
        return cls(GrammarKind.LARK, "start: " + " | ".join(map(json.dumps, choices)), name)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the tokens of one request.

    The model's logits pass, in this order, through repetition, presence and frequency penalties,
    `logit_bias`, `min_tokens` (which bars the tokens that would end the text), `grammar` (which bars
    what it does not allow), `temperature`, `top_k`, `top_p` (of what top_k left) and `min_p`.

    max_tokens: tokens to generate at most; None: as many as the model and the cache hold.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
    min_p: least probability, relative to the likeliest token's; 0 is off.
    repetition_penalty: divides positive and multiplies negative logits of tokens of prompt or
        output.
    presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens of the
        output.
    seed: makes the tokens reproducible whatever else runs; each of `n` draws from its own stream.
    n: sequences to generate from the one prompt; full pages of the prompt are shared.
    stop: strings that end the text and are not part of it. stop_token_ids: likewise for tokens.
    logprobs, prompt_logprobs: None is off; k gives each token's log probability and the k likeliest
        tokens, under the model's own distribution (before penalties, bias and filters).
    min_tokens: stops of any kind are not looked for before this many tokens.
    ignore_eos: go on past the model's end-of-text tokens.
    grammar: what the text must be; tokens that end it are barred until it is. `stop` and
        `max_tokens` may still cut it short.
    skip_special_tokens: leave out of the text those that the tokenizer calls special.
    """

    max_tokens: int | None = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))
        self._check_integers()
        self._check_reals()
        self._check_tokens()

    def __reduce__(self) -> tuple[Any, ...]:
        """To be pickled, which a view of a dict cannot be."""
        given = self.__dict__ | {"logit_bias": dict(self.logit_bias)}
        return partial(SamplingParams, **given), ()

    def _check_integers(self) -> None:
        for name in ("max_tokens", "n"):
            _check_integer(name, getattr(self, name), 1, optional=name == "max_tokens")
        for name in ("top_k", "min_tokens"):
            _check_integer(name, getattr(self, name), 0)
        for name in ("logprobs", "prompt_logprobs"):
            _check_integer(name, getattr(self, name), 0, optional=True)
        _check_integer("seed", self.seed, -(2**63), 2**63 - 1, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")

    def _check_reals(self) -> None:
        _check_real("temperature", self.temperature, 0, 100)
        _check_real("top_p", self.top_p, 0, 1, above=True)
        _check_real("min_p", self.min_p, 0, 1)
        _check_real("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _check_real("presence_penalty", self.presence_penalty, -100, 100)
        _check_real("frequency_penalty", self.frequency_penalty, -100, 100)

    def _check_tokens(self) -> None:
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0)
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias", token, 0)
            _check_real(f"logit_bias[{token}]", bias, -100, 100)
        if self.grammar is not None and (self.ignore_eos or self.min_tokens):
            raise RequestError(
                f"{self.grammar.name} says where the text ends; it cannot be used with "
                f"{'ignore_eos' if self.ignore_eos else 'min_tokens'}"
            )


def _as_strings(name: str, value: str | tuple[str, ...]) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"{name} must hold non-empty strings, got {string!r}")
    return strings


def _check_integer(
    name: str, value: object, low: int, high: int = 2**63 - 1, optional: bool = False
) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        bound = f"at least {low}" if value < low else f"at most {high}"
        raise RequestError(f"{name} must be {bound}, got {value!r}")


def _check_real(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        raise RequestError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (above and value == low):
        raise RequestError(
            f"{name} must lie in {'(' if above else '['}{low}, {high}], got {value!r}"
        )


class TokenLogprob(NamedTuple):
    """Natural-log probability of one token.

    `rank` is 1 for the likeliest; `top` lists (token, logprob), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class SequenceOutput(NamedTuple):
    """What one sequence of a request gained in one step.

    text: characters that are final; a half character or a possible start of a stop string is held
        back until it is decided.
    logprobs: one entry per token of `token_ids`, or None if they were not asked for.
    stop_reason: the stop string or token that ended the sequence; None for an end-of-text token.
    """

    index: int  # type: ignore[assignment]  # instead of the method of tuples
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestOutput(NamedTuple):
    """What one request gained in one step: the deltas of those of its sequences that moved.

    prompt_tokens: length of the prompt. cached_tokens: how many of them were read from the prefix
        cache.
    finished: no further output will come for this request.
    prompt_logprobs: one entry per prompt token (the first is None), in the first output only, if
        asked for.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    outputs: tuple[SequenceOutput, ...]
    finished: bool
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
