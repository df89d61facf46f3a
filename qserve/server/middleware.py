"""What surrounds every endpoint: request ids, the request log, API keys and the body's limits."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve.engine.request import SamplingParams
from qserve.server.errors import CLIENT_CLOSED_REQUEST, APIError
from qserve.server.metrics import Stopwatch
from qserve.server.responses import Usage

logger = logging.getLogger("qserve.server")
request_logger = logging.getLogger("qserve.requests")
"""Gets a JSON object per request, at level INFO."""

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

PROTECTED_PATHS = ("/v1/", "/tokenize", "/detokenize")
"""Beginnings of the paths that need an API key, where keys are set."""


@dataclass
class RequestRecord:
    """What is known of a request once it is answered.

    status: None if the client left before it was answered.
    params, stopwatch, usage: set by what generates text, `usage` once it is final.
    """

    request_id: str
    arrival: float = field(default_factory=time.monotonic)
    status: int | None = None
    params: SamplingParams | None = None
    stopwatch: Stopwatch | None = None
    usage: Usage | None = None


class RequestContext:
    """Gives each request an id, answers its unexpected errors, and logs how it ended.

    The id is the client's own where it sends a sound one. The record is `request.state.record`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(Headers(scope=scope)))
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            await _answer_unexpected(error, record, scope, receive, send_with_id)
        finally:
            _log(scope, record)


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


async def _answer_unexpected(
    error: Exception, record: RequestRecord, scope: Scope, receive: Receive, send: Send
) -> None:
    logger.error("request %s failed", record.request_id, exc_info=error)
    if record.status is None:
        answer = APIError(500, f"internal error: {type(error).__name__}")
        await answer.response(scope, receive, send)


def _log(scope: Scope, record: RequestRecord) -> None:
    if not request_logger.isEnabledFor(logging.INFO):
        return
    line: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "client": (scope.get("client") or [None])[0],
        "method": scope["method"],
        "path": scope["path"],
        "status": record.status or CLIENT_CLOSED_REQUEST,
        "seconds": round(time.monotonic() - record.arrival, 6),
    }
    if record.usage is not None:
        line["prompt_tokens"] = record.usage.prompt_tokens
        line["cached_tokens"] = record.usage.prompt_tokens_details.cached_tokens
        line["completion_tokens"] = record.usage.completion_tokens
    request_logger.info(json.dumps(line))


class ApiKeys:
    """Lets only those with one of the keys pass to the protected paths."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_protected = scope["type"] == "http" and scope["path"].startswith(PROTECTED_PATHS)
        if is_protected and not self._is_known(Headers(scope=scope)):
            await _UNAUTHORIZED.response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        """Takes as long whatever the key is: digests are as long as each other, and all compared."""
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


_UNAUTHORIZED = APIError(
    401,
    "a valid API key is needed, as the header 'Authorization: Bearer KEY'",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


class BodyLimit:
    """Reads each request's body whole before its endpoint runs; refuses the long and the slow.

    What exceeds `max_bytes` is read and dropped, so that the client gets to see the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._max_seconds)
        except ClientDisconnect:
            return
        except asyncio.TimeoutError:
            refusal = APIError(408, f"the body did not arrive within {self._max_seconds:g} seconds")
            refusal.headers = {"Connection": "close"}
            await refusal.response(scope, receive, send)
        except APIError as refusal:
            await refusal.response(scope, receive, send)
        else:
            await self._app(scope, _replayed(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= self._max_bytes:
                chunks.append(chunk)
            more = message.get("more_body", False)
        if size > self._max_bytes:
            raise APIError(413, f"the body exceeds {self._max_bytes} bytes")
        return b"".join(chunks)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
