"""The HTTP application: the OpenAI API over an AsyncEngine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

import qserve
from qserve.engine.request import RequestOutput
from qserve.server.answer import Answer, ChatAnswer, CompletionAnswer, Span
from qserve.server.async_engine import (
    AsyncEngine,
    EngineFailedError,
    OutputStream,
    QueueFullError,
)
from qserve.server.errors import APIError, error_answers, install_error_handlers
from qserve.server.metrics import Metrics, Stopwatch
from qserve.server.protocol import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    GenerationRequest,
    ModelCard,
    ModelList,
)
from qserve.server.text import TextCodec

_T = TypeVar("_T")


def create_app(engine: AsyncEngine, tokenizer: PreTrainedTokenizerBase, model_name: str) -> FastAPI:
    """The application; it starts the engine's thread when it starts and ends it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(title="QServe", version=qserve.__version__, lifespan=lifespan)
    install_error_handlers(app)
    service = _Service(engine, TextCodec(tokenizer), model_name)
    generates: dict[str, Any] = {"methods": ["POST"], "responses": error_answers(400, 404, 429)}
    app.add_api_route(
        "/v1/completions", service.completions, response_model=Completion, **generates
    )
    app.add_api_route(
        "/v1/chat/completions", service.chat, response_model=ChatCompletion, **generates
    )
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/health", service.health, responses=error_answers(503))
    app.add_api_route("/metrics", service.metrics, response_class=Response)
    return app


class _Service:
    """The endpoints."""

    def __init__(self, engine: AsyncEngine, codec: TextCodec, model_name: str) -> None:
        self._engine = engine
        self._codec = codec
        self._model = model_name
        self._started = int(time.time())
        self._metrics = Metrics(lambda: engine.stats, model_name)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue each of the given prompts."""
        self._check_model(body)
        prompts = [await self._codec.encode_prompt(prompt) for prompt in body.prompts]
        echoed = prompts if body.echo else None
        answer = CompletionAnswer(self._model, self._codec, body.n or 1, echoed)
        return await self._respond(body, prompts, answer, request)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Give the assistant's next message of a conversation."""
        self._check_model(body)
        prompt = await self._codec.encode_chat(body.messages)
        answer = ChatAnswer(self._model, self._codec, body.n or 1)
        return await self._respond(body, [prompt], answer, request)

    async def models(self) -> ModelList:
        """The one model that is served."""
        return ModelList(data=[ModelCard(id=self._model, created=self._started)])

    async def health(self) -> dict[str, str]:
        """200 while the engine works, 503 with its error once it has failed."""
        if self._engine.failure is not None:
            raise APIError(503, f"the engine has failed: {self._engine.failure}")
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)

    def _check_model(self, body: GenerationRequest) -> None:
        if body.model not in (None, self._model):
            raise APIError(
                404,
                f"model {body.model!r} is not served, only {self._model!r} is",
                "model",
                "model_not_found",
            )

    async def _respond(
        self,
        body: GenerationRequest,
        prompts: Sequence[list[int]],
        answer: Answer,
        request: Request,
    ) -> Response:
        stopwatch = self._metrics.stopwatch()
        stream = await self._submit(prompts, body)
        spans = _spans(stream, answer, stopwatch)
        if body.stream:
            return _EventStream(stream, _events(spans, answer, body.include_usage))
        try:
            whole = await _while_connected(request.receive, _collect(spans))
        except EngineFailedError as error:
            raise _engine_failed(error) from error
        finally:
            stream.close()
        return _json(answer.whole(whole))

    async def _submit(self, prompts: Sequence[list[int]], body: GenerationRequest) -> OutputStream:
        try:
            return await self._engine.submit(prompts, body.sampling_params())
        except QueueFullError as error:
            raise APIError(429, str(error), headers={"Retry-After": "1"}) from error
        except EngineFailedError as error:
            raise _engine_failed(error) from error


def _engine_failed(error: EngineFailedError) -> APIError:
    return APIError(500, f"the engine has failed: {error}")


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


async def _spans(
    stream: OutputStream, answer: Answer, stopwatch: Stopwatch
) -> AsyncIterator[list[Span]]:
    """What clients see of the engine's outputs, in lists of what arrived at the same time."""
    async for outputs in stream:
        yield [span for output in outputs for span in _taken(output, stream, answer, stopwatch)]


def _taken(
    output: RequestOutput, stream: OutputStream, answer: Answer, stopwatch: Stopwatch
) -> list[Span]:
    stopwatch.take(output)
    return [span for span in answer.take(stream.prompt_index(output), output) if not span.is_empty]


async def _collect(spans: AsyncIterator[list[Span]]) -> list[Span]:
    return [span async for batch in spans for span in batch]


async def _events(
    spans: AsyncIterator[list[Span]], answer: Answer, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first ends the stream as its last."""
    try:
        async for batch in spans:
            yield b"".join(_event(answer.part(span).model_dump_json()) for span in batch)
    except EngineFailedError as error:
        yield _event(_engine_failed(error).body.model_dump_json())
        return
    if include_usage:
        yield _event(answer.closing().model_dump_json())
    yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


class _EventStream(Response):
    """Sends events as they come; closes the stream when they end or the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, stream: OutputStream, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._stream = stream
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(receive, self._send_all(send))
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._stream.close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`; ClientDisconnect, and `work` cancelled, if the client goes away."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
