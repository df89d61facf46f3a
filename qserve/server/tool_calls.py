"""Calls of tools in what a model writes, for the styles that families of models have."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product
from typing import Any
from uuid import uuid4

from qserve.engine.grammar import JSON_WHITESPACE
from qserve.engine.request import Grammar, GrammarKind, RequestError, SamplingParams
from qserve.engine.text import num_begun
from qserve.server.tools import Tool, ToolUse


@dataclass(frozen=True)
class ToolStyle:
    """How a family of models writes a call: begin, an object with its name and arguments, end.

    marker: what announces a call within text. may_begin_bare: a text may begin with a call that
    nothing announces, and so may what follows another call. separator: between two calls.
    arguments: their key.
    """

    marker: str
    begin: str
    end: str
    separator: str
    arguments: str
    may_begin_bare: bool


STYLES = {
    "hermes": ToolStyle("<tool_call>", "<tool_call>\n", "\n</tool_call>", "\n", "arguments", False),
    "llama3": ToolStyle("<|python_tag|>", "", "", "; ", "parameters", True),
}
"""Hermes' style is also Qwen's."""


def style_of(chat_template: str | None, name: str | None = None) -> ToolStyle | None:
    """The style called `name`, or else the one a chat template teaches the model, if any."""
    if name is not None:
        return STYLES[name]
    template = chat_template or ""
    if "tools" not in template:
        return None
    if STYLES["hermes"].marker in template:
        return STYLES["hermes"]
    return STYLES["llama3"] if '"parameters"' in template else None


_BETWEEN_CALLS = "}; \n\r\t"


@dataclass(frozen=True)
class CallPart:
    """A stretch of a text's `index`-th call; the first of a call has its id and name.

    written: what the model wrote.
    """

    index: int
    arguments: str
    written: str
    id: str | None = None
    name: str | None = None


def calls_grammar(style: ToolStyle, use: ToolUse, answer: Grammar | None = None) -> Grammar:
    """Nothing but calls, of tools that may be called and with arguments that fit; or the answer,
    which is JSON."""
    head = f"start: call{f' ({json.dumps(style.separator)} call)*' if use.parallel else ''}"
    calls = " | ".join(f"call_{index}" for index in range(len(use.may_call)))
    rules = [_call_rules(style, index, tool) for index, tool in enumerate(use.may_call)]
    if answer is not None:
        head += " | answer"
        rules.append(_json_rule("answer", json.loads(answer.text)))
    return Grammar(GrammarKind.LARK, "\n".join([head, f"call: {calls}", *rules]), "tools")


def _call_rules(style: ToolStyle, index: int, tool: Tool) -> str:
    head = f'{style.begin}{{"name": {json.dumps(tool.function.name)}, "{style.arguments}": '
    call = f"{json.dumps(head)} arguments_{index} {json.dumps('}' + style.end)}"
    arguments = _json_rule(f"arguments_{index}", tool.function.schema_of_arguments)
    return f"call_{index}: {call}\n{arguments}"


def _json_rule(name: str, schema: dict[str, Any]) -> str:
    options = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    return f"{name}: %json {json.dumps(schema | options)}"


def guided_by_tools(params: SamplingParams, style: ToolStyle, use: ToolUse) -> SamplingParams:
    """How to sample where tools may or must be called; RequestError if the text must be other than
    a call or JSON."""
    answer = params.grammar
    if answer is not None and (use.must_call or answer.kind is not GrammarKind.JSON_SCHEMA):
        raise RequestError(f"{answer.name} cannot be used with this tool_choice")
    guided = use.must_call or answer is not None
    grammar = calls_grammar(style, use, answer) if guided else None
    return replace(params, grammar=grammar, skip_special_tokens=False)


class ToolCallReader:
    """Takes the calls out of one text that comes in pieces; the pieces' borders make no difference.

    A call counts from where its arguments begin, if it names a tool; what does not read like one
    stays text. White space before a call and after it is dropped.
    """

    def __init__(self, style: ToolStyle, use: ToolUse) -> None:
        self.num_calls = 0
        self._style = style
        self._names = {tool.function.name for tool in use.may_call}
        self._parallel = use.parallel
        self._held = ""
        self._announced = ""  # what has been read of a call that may yet be none
        self._object = _ObjectReader()
        self._read = self._in_header if style.may_begin_bare else self._in_text

    def feed(self, text: str) -> list[str | CallPart]:
        """The text and the calls that become certain with more text."""
        self._held += text
        parts: list[str | CallPart] = []
        while (more := self._read()) is not None:
            parts += more
        return parts

    def finish(self) -> str:
        """The text that is left when no more is to come."""
        rest = "" if self._read == self._after_arguments else self._announced + self._held
        return rest if rest.strip() or not self.num_calls else ""

    # The states; each returns what it has read, or None if it needs more to go on.

    def _in_text(self) -> list[str | CallPart] | None:
        marker = self._style.marker
        before, found, after = self._held.partition(marker)
        certain = before[: len(before) - num_begun(before, (marker,))].rstrip()
        if found:
            certain = before.rstrip()
            self._announced, self._held = before[len(certain) :] + marker, after
            self._read = self._in_header
            return [certain] if certain else []
        self._held = self._held[len(certain) :]
        return [certain] if certain else None

    def _in_header(self) -> list[str | CallPart] | None:
        headers = _headers(self._style.marker)
        found = next(filter(None, (header.match(self._held) for header, _ in headers)), None)
        if found and found["name"] in self._names:
            return [self._begin(found)]
        if not found and any(beginning.fullmatch(self._held) for _, beginning in headers):
            return None
        announced, self._announced = self._announced, ""
        self._read = self._in_text
        return [announced] if announced else []

    def _begin(self, header: re.Match[str]) -> CallPart:
        written, self._announced = self._announced + header[0], ""
        self._held = self._held[header.end() :]
        self._read, self._object = self._in_arguments, _ObjectReader()
        self.num_calls += 1
        return CallPart(
            self.num_calls - 1, "", written, id=f"call_{uuid4().hex[:24]}", name=header["name"]
        )

    def _in_arguments(self) -> list[str | CallPart] | None:
        end = self._object.feed(self._held)
        piece = self._held[:end]
        self._held = self._held[len(piece) :]
        if end is not None:
            self._read = self._after_arguments
        return [CallPart(self.num_calls - 1, piece, piece)] if piece else None

    def _after_arguments(self) -> list[str | CallPart] | None:
        end = self._style.end.strip()
        self._held = self._held.lstrip(_BETWEEN_CALLS)
        while end and self._held.startswith(end):
            self._held = self._held.removeprefix(end).lstrip(_BETWEEN_CALLS)
        if end.startswith(self._held):
            return None
        if not self._parallel:
            self._read = self._ignore
        else:
            self._read = self._in_header if self._style.may_begin_bare else self._in_text
        return []

    def _ignore(self) -> None:
        self._held = ""


class _ObjectReader:
    """Finds the end of a JSON object in text that comes in pieces and begins with its brace."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False

    def feed(self, text: str) -> int | None:
        """Where the text goes on after the object, if it ends here."""
        return next((i for i, char in enumerate(text, 1) if self._ends_with(char)), None)

    def _ends_with(self, character: str) -> bool:
        if self._in_string:
            self._in_string = self._is_escaped or character != '"'
            self._is_escaped = character == "\\" and not self._is_escaped
            return False
        self._in_string = character == '"'
        self._depth += (character in "{[") - (character in "}]")
        return self._depth == 0


@lru_cache
def _headers(marker: str) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    """What comes before a call's arguments, marker or not, and what that may begin with.

    Models mix up the two keys.
    """
    blank, headers = r"\s*", []
    for announced, key in product(("", marker), ("arguments", "parameters")):
        parts = [blank, *map(re.escape, announced), blank, r"\{", blank, *'"name"', blank, ":"]
        parts += [blank, '"', r'(?P<name>[^"\\]*)', '"', blank, ",", blank, *f'"{key}"']
        parts += [blank, ":", blank]
        beginning = reduce(lambda rest, part: f"(?:{part}{rest})?", reversed(parts), "")
        headers.append((re.compile("".join(parts) + r"(?=\{)"), re.compile(beginning)))
    return headers
