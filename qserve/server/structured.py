"""How requests ask for structured output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, model_validator

from qserve.engine.request import Grammar, GrammarKind, RequestError
from qserve.server.fields import RequestModel, Text

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """`strict` makes no difference: the schema is always kept to."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default=ANY_OBJECT, alias="schema")
    strict: StrictBool | None = None


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(RequestModel):
    """Exactly one of its fields, named as vLLM names them; `grammar` is in Lark's notation."""

    json_: dict[str, Any] | StrictBool | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, fail_fast=True)] | None = None
    grammar: Text | None = None

    @model_validator(mode="after")
    def _check_one_is_given(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("must have one of json, regex, choice and grammar")
        return self

    def as_grammar(self, name: str) -> Grammar:
        if self.json_ is not None:
            return Grammar.of_json(self.json_, name)
        if self.regex is not None:
            return Grammar(GrammarKind.REGEX, self.regex, name)
        if self.grammar is not None:
            return Grammar(GrammarKind.LARK, self.grammar, name)
        return Grammar.of_choices(self.choice or (), name)


def requested_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> Grammar | None:
    """What the text must be, if a request says so. Raises RequestError if it does so twice."""
    if structured_outputs is None:
        return None if response_format is None else _grammar_of_format(response_format)
    if response_format is not None:
        raise RequestError("structured_outputs and response_format exclude each other")
    return structured_outputs.as_grammar("structured_outputs")


def _grammar_of_format(response_format: ResponseFormat) -> Grammar | None:
    if isinstance(response_format, TextFormat):
        return None
    schema = ANY_OBJECT
    if isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema_
    return Grammar.of_json(schema, "response_format")
