"""Tools in requests: what the assistant may call, has called, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import StrictBool, StringConstraints

from qserve.engine.request import RequestError
from qserve.server.fields import RequestModel, Text

FunctionName = Annotated[str, StringConstraints(pattern=r"^[\w.:/-]{1,128}$")]


class Function(RequestModel):
    """parameters: a JSON schema. `strict` makes no difference."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        if self.parameters is None:
            return {"type": "object", "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(RequestModel):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        return self.model_dump(exclude_none=True)


class FunctionReference(RequestModel):
    name: str


class NamedToolChoice(RequestModel):
    type: Literal["function"]
    function: FunctionReference


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class FunctionCall(RequestModel):
    """arguments: JSON, as the assistant wrote it."""

    name: str
    arguments: Text


class ToolCall(RequestModel):
    """A call that an assistant made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: with the arguments as a value, if they are valid JSON."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


@dataclass(frozen=True)
class ToolUse:
    """What a request allows of tools.

    tools: what the model is told of. may_call: those it may choose from. must_call: it has no other
    choice. parallel: it may make several calls.
    """

    tools: tuple[Tool, ...]
    may_call: tuple[Tool, ...]
    must_call: bool
    parallel: bool


def tool_use(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> ToolUse | None:
    """None if there are no tools to use. RequestError if the choice is not one of them."""
    if not tools and choice not in (None, "none", "auto"):
        raise RequestError("tool_choice asks for a call, but there are no tools")
    if not tools or choice == "none":
        return None
    if not isinstance(choice, NamedToolChoice):
        return ToolUse(tuple(tools), tuple(tools), choice == "required", parallel is not False)
    named = tuple(tool for tool in tools if tool.function.name == choice.function.name)
    if not named:
        raise RequestError(f"tool_choice {choice.function.name!r} is none of the tools")
    return ToolUse(tuple(tools), named, must_call=True, parallel=False)
