"""The OpenAI API's requests, as far as they are supported; anything else is refused.

A field that is absent or null takes its default. Ranges are the engine's to check.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import Field, StrictBool, StrictFloat, StrictInt, model_validator

from qserve.engine.request import Grammar, RequestError, SamplingParams
from qserve.server.fields import RequestModel, Text, at_most
from qserve.server.structured import ResponseFormat, StructuredOutputs, requested_grammar
from qserve.server.tools import Tool, ToolCall, ToolChoice, ToolUse, tool_use

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PROMPTS = 10_000
MAX_MESSAGES = 10_000
MAX_TOOLS = 1024
MAX_ENTRIES = 16
"""Of `metadata`, and of the settings of a chat template."""

MAX_STOPS = 16
MAX_NAMED_TOKENS = 1024
"""Of `logit_bias` and of `stop_token_ids`: each, as each stop, costs a sequence time at every step."""

DEFAULT_COMPLETION_TOKENS = 16
"""What the OpenAI API gives a completion that does not ask for a number; a chat has no limit."""

Tokens = Annotated[list[StrictInt], Field(fail_fast=True)]
LogprobCount = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]


TemplateSettings = Annotated[dict[str, Any], at_most(MAX_ENTRIES)]
"""Variables for the chat template, such as Qwen3's `enable_thinking`."""


class StreamOptions(RequestModel):
    """continuous_usage_stats: every event has the usage so far."""

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class GenerationRequest(RequestModel):
    """What both ways to ask for text have in common; the last fields are accepted and not used."""

    model: str | None = None
    max_tokens: StrictInt | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    n: Annotated[StrictInt, Field(le=MAX_CHOICES)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: (
        Annotated[list[StrictInt], Field(max_length=MAX_NAMED_TOKENS, fail_fast=True)] | None
    ) = None
    seed: StrictInt | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    logit_bias: Annotated[dict[str, StrictFloat], at_most(MAX_NAMED_TOKENS)] | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Annotated[dict[str, str], at_most(MAX_ENTRIES)] | None = None
    store: StrictBool | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def grammar(self) -> Grammar | None:
        """What the text must be."""
        return requested_grammar(self.response_format, self.structured_outputs)

    def sampling_params(self) -> SamplingParams:
        """What to ask the engine for; RequestError names a field out of range."""
        raise NotImplementedError

    def _sampling_params(self, **special: Any) -> SamplingParams:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise RequestError("stream_options is only for requests with stream = true")
        given = {name: getattr(self, name) for name in _PASSED_ON}
        given["logit_bias"] = _token_biases(self.logit_bias or {})
        given["grammar"] = self.grammar
        return SamplingParams(**{k: v for k, v in given.items() if v is not None} | special)


_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_token_ids",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)


_TOKEN_ID = re.compile("0|[1-9][0-9]{0,17}")


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    for token in biases:
        if not _TOKEN_ID.fullmatch(token):
            raise RequestError(f"logit_bias must have token ids as keys, got {token[:20]!r}")
    return {int(token): bias for token, bias in biases.items()}


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        Text
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS, fail_fast=True)],
        Field(min_length=1),
    ]
    echo: StrictBool | None = None
    logprobs: LogprobCount | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The texts or token lists to continue."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str | list[int]]", self.prompt)

    def sampling_params(self) -> SamplingParams:
        return self._sampling_params(
            max_tokens=DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class TextPart(RequestModel):
    type: Literal["text"]
    text: Text


class ChatMessage(RequestModel):
    """name: of a participant, or of the tool that answers. `refusal` is accepted and not used."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check_fits_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls is only for the assistant, not for the role {self.role}")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("tool_call_id is for the role tool, and needed there")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._text}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message |= {"tool_call_id": self.tool_call_id, "name": self.name}
        return message

    @property
    def _text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class ChatCompletionRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: LogprobCount | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: TemplateSettings = Field(default_factory=dict)

    @property
    def tool_use(self) -> ToolUse | None:
        """What the assistant may call, if anything; RequestError if that makes no sense."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def sampling_params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only for requests with logprobs = true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise RequestError("max_tokens and max_completion_tokens differ")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling_params(max_tokens=next(iter(limits), None), logprobs=logprobs)


class TokenizeRequest(RequestModel):
    """A text as a completion takes it, or a conversation as a chat takes it."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateSettings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_one_is_given(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        return self


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: Tokens
