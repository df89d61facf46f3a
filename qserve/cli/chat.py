"""A chat in the terminal, with a model of its own or with a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any

import httpx

from qserve.cli.options import API_KEY_VARIABLE
from qserve.config import ConfigError
from qserve.engine.engine import Engine
from qserve.engine.request import SamplingParams
from qserve.engine.text import encode_chat

HELP = "/new begins a new conversation, /exit or Ctrl-D ends; Ctrl-C stops an answer"

Message = dict[str, str]
Pieces = Generator[str, None, None]
Reply = Callable[[list[Message]], Pieces]
"""Gives the assistant's next message in pieces; closing it stops the work. ValueError if refused."""


class ChatError(ValueError):
    """A server could not be reached or refused a request."""


def engine_reply(engine: Engine, params: SamplingParams) -> Reply:
    """Answers of an engine in this process."""

    def reply(messages: list[Message]) -> Pieces:
        engine.add_request("chat", encode_chat(engine.tokenizer, messages), params)
        try:
            while engine.has_unfinished:
                for output in engine.step():
                    yield output.outputs[0].text
        finally:
            engine.abort("chat")

    return reply


def server_reply(url: str, fields: dict[str, Any]) -> Reply:
    """Answers of the server at `url`, its root or its /v1; raises ChatError if it is not there.

    fields: of each request, besides the messages. The API key, if any, is in QSERVE_API_KEY.
    """
    key = os.environ.get(API_KEY_VARIABLE)
    client = httpx.Client(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(10, read=None),
    )
    with _reaching(url):
        _check(client.get("/v1/models"))

    def reply(messages: list[Message]) -> Pieces:
        body = {**fields, "messages": messages, "stream": True}
        with _reaching(url), client.stream("POST", "/v1/chat/completions", json=body) as answer:
            _check(answer)
            yield from _pieces(answer.iter_lines())

    return reply


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ChatError(f"{url} cannot be reached: {error}") from error


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        message = json.loads(answer.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {answer.status_code}"
    raise ChatError(message)


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """The text in a stream of server-sent events."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if data:
            part = json.loads(data)
            if "error" in part:
                raise ChatError(part["error"]["message"])
            yield part["choices"][0]["delta"]["content"]


def converse(reply: Reply, system: str | None) -> None:
    """Talk until the user ends it; what could not be answered is not part of the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing, and the arrow keys earlier lines)
    print(HELP, file=sys.stderr)
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    for text in _lines():
        if text == "/exit":
            return
        if text == "/new":
            messages = list(beginning)
            continue
        asked: Message = {"role": "user", "content": text}
        answer = _print_answer(reply, [*messages, asked])
        if answer:
            messages += [asked, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    """What the user types, until the end of it."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text:
            yield text


def _print_answer(reply: Reply, messages: list[Message]) -> str:
    """The answer, as far as it came."""
    answer = ""
    pieces = reply(messages)
    try:
        with _Interrupt() as interrupt, contextlib.closing(pieces):
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
                if interrupt.is_wanted:
                    break
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    print()
    return answer


class _Interrupt:
    """Ctrl-C asks for an end at the next piece; a second one does not wait for it."""

    is_wanted = False

    def __enter__(self) -> _Interrupt:
        self._former = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._former)

    def _take(self, _: int, __: FrameType | None) -> None:
        if self.is_wanted:
            raise KeyboardInterrupt
        self.is_wanted = True


def check_options_of_a_server(precision: str | None, kv: str | None) -> None:
    """A server's model is as it is."""
    for option, value in (("--precision", precision), ("--kv", kv)):
        if value is not None:
            raise ConfigError(f"{option} is for a model that is loaded here, not for a server")
