"""The endpoints that generate text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from qserve.engine.request import RequestError, RequestOutput, SamplingParams
from qserve.server.answer import Answer, Span, joined
from qserve.server.chat_answer import ChatAnswer
from qserve.server.completion_answer import CompletionAnswer
from qserve.server.errors import as_api_error, check_model
from qserve.server.metrics import Metrics, Stopwatch
from qserve.server.middleware import RequestRecord
from qserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    StreamOptions,
)
from qserve.server.shared_engine import OutputStream, ServingError, SharedEngine
from qserve.server.streaming import EventStream, event, while_connected
from qserve.server.text import TextCodec
from qserve.server.tool_calls import ToolCallReader, ToolStyle, guided_by_tools


class GenerationService:
    """Completions and chat.

    timeout: seconds that a request may take, None: any number. tool_style: how the model writes
    calls of tools, None: it does not.
    """

    def __init__(
        self,
        engine: SharedEngine,
        codec: TextCodec,
        metrics: Metrics,
        model_name: str,
        timeout: float | None,
        tool_style: ToolStyle | None,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._metrics = metrics
        self._model = model_name
        self._timeout = timeout
        self._tool_style = tool_style

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue each of the given prompts."""
        self._check_acceptable(body, len(body.prompts))
        prompts = [await self._codec.encode_prompt(prompt) for prompt in body.prompts]
        echoed = prompts if body.echo else None
        answer = CompletionAnswer(self._model, self._codec, body.n or 1, echoed)
        return await self._respond(body, body.sampling_params(), prompts, answer, request)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Give the assistant's next message of a conversation."""
        self._check_acceptable(body, 1)
        use, params = body.tool_use, body.sampling_params()
        if use is None:
            prompt = await self._codec.encode_chat(body.messages, (), body.chat_template_kwargs)
            answer = ChatAnswer(self._model, self._codec, params.n)
            return await self._respond(body, params, [prompt], answer, request)
        if self._tool_style is None:
            raise RequestError(
                "tools are not known to the model's chat template, and the server is not told "
                "(--tool-parser) how the model writes calls"
            )
        params = guided_by_tools(params, self._tool_style, use)
        settings = body.chat_template_kwargs
        prompt = await self._codec.encode_chat(body.messages, use.tools, settings)
        new_reader = partial(ToolCallReader, self._tool_style, use)
        answer = ChatAnswer(self._model, self._codec, params.n, new_reader)
        return await self._respond(body, params, [prompt], answer, request)

    def _check_acceptable(self, body: GenerationRequest, num_prompts: int) -> None:
        """Refuse, before any work, what would be refused after it."""
        check_model(body.model, self._model)
        self._engine.check_room(num_prompts, body.n or 1)

    async def _respond(
        self,
        body: GenerationRequest,
        params: SamplingParams,
        prompts: Sequence[list[int]],
        answer: Answer,
        request: Request,
    ) -> Response:
        record: RequestRecord = request.state.record
        record.params = params
        record.stopwatch = stopwatch = self._metrics.stopwatch()
        stream = await self._engine.submit(prompts, params, self._timeout)

        def close() -> None:
            stream.close()
            record.usage = answer.usage

        spans = _spans(stream, answer, stopwatch)
        if body.stream:
            return EventStream(_events(spans, answer, body.stream_options), close)
        try:
            whole = await while_connected(request.receive, _collect(spans))
        finally:
            close()
        return _json(answer.whole(whole))


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


async def _spans(
    stream: OutputStream, answer: Answer, stopwatch: Stopwatch
) -> AsyncIterator[list[Span]]:
    """What clients see of the engine's outputs: of each choice, what arrived at the same time."""
    async for outputs in stream:
        spans = joined(
            span for output in outputs for span in _taken(output, stream, answer, stopwatch)
        )
        yield [span for span in spans if not span.is_empty]


def _taken(
    output: RequestOutput, stream: OutputStream, answer: Answer, stopwatch: Stopwatch
) -> Iterable[Span]:
    stopwatch.take(output)
    return answer.take(stream.prompt_index(output), output)


async def _collect(spans: AsyncIterator[list[Span]]) -> list[Span]:
    return [span async for batch in spans for span in batch]


async def _events(
    spans: AsyncIterator[list[Span]], answer: Answer, options: StreamOptions
) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first ends the stream as its last."""
    try:
        async for batch in spans:
            usage = answer.usage if options.continuous_usage_stats else None
            yield b"".join(event(answer.event(span, usage)) for span in batch)
    except ServingError as error:
        yield event(as_api_error(error).body.model_dump_json())
        return
    if options.include_usage:
        yield event(answer.closing().model_dump_json())
    yield event("[DONE]")
