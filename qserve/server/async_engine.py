"""The engine on a thread of its own, shared by the coroutines of one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol
from uuid import uuid4

from qserve.engine.engine import EngineStats
from qserve.engine.request import RequestError, RequestOutput, SamplingParams

logger = logging.getLogger("qserve.server")

_Event = Sequence[RequestOutput] | Exception
_ADMITTED: tuple[RequestOutput, ...] = ()


class ServedEngine(Protocol):
    """What of an engine is used; `qserve.engine.engine.Engine` says what it means."""

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    @property
    def has_unfinished(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...


class ServingError(Exception):
    """A request was not taken on or not finished, through no fault of its own."""


class QueueFullError(ServingError):
    """The server already holds as many requests as it may."""


class DrainingError(ServingError):
    """The server finishes what it holds and takes on nothing more."""


class RequestTimeoutError(ServingError):
    """A request was not finished in its time."""


class EngineFailedError(ServingError):
    """The engine's thread has ended with an error; nothing will be served any more."""


@dataclass(frozen=True)
class StepTotals:
    """The engine's steps since it was started, and the seconds they took."""

    steps: int = 0
    seconds: float = 0.0

    def with_step(self, seconds: float) -> StepTotals:
        return StepTotals(self.steps + 1, self.seconds + seconds)


class OutputStream:
    """What the engine produces for prompts that were submitted together.

    Iterating gives lists of outputs, all that have arrived since the last, until every prompt is
    finished; EngineFailedError if the engine dies, RequestTimeoutError if the time is up. `close`
    may come at any time, and must come.
    """

    def __init__(self, num_prompts: int, forget: Callable[[OutputStream], None]) -> None:
        group = uuid4().hex
        self.request_ids = {f"{group}-{index}": index for index in range(num_prompts)}
        self._forget = forget
        self._unfinished = num_prompts
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None

    def prompt_index(self, output: RequestOutput) -> int:
        """Which of the submitted prompts an output belongs to."""
        return self.request_ids[output.request_id]

    def put(self, event: _Event) -> None:
        self._events.put_nowait(event)

    def expire_in(self, seconds: float) -> None:
        """Let the stream end with RequestTimeoutError, and its pages be freed, after so long."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self.put(RequestTimeoutError(f"the request was not finished within {seconds:g} seconds"))
        self.close()

    async def wait_until_admitted(self) -> None:
        _raise_if_error(await self._events.get())

    async def __aiter__(self) -> AsyncIterator[list[RequestOutput]]:
        while self._unfinished:
            outputs = list(_raise_if_error(await self._events.get()))
            while not self._events.empty():
                outputs += _raise_if_error(self._events.get_nowait())
            self._unfinished -= sum(output.finished for output in outputs)
            yield outputs

    def close(self) -> None:
        """Abort what is unfinished and free its pages."""
        if self._timer is not None:
            self._timer.cancel()
        self._forget(self)


def _raise_if_error(event: _Event) -> Sequence[RequestOutput]:
    if isinstance(event, Exception):
        raise event
    return event


class AsyncEngine:
    """Runs an engine; to be used from the event loop that called `start`.

    max_requests: prompts held at a time, running and waiting together.
    """

    def __init__(self, engine: ServedEngine, max_requests: int) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._streams: dict[str, OutputStream] = {}
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="qserve-engine", daemon=True)
        self._stats = engine.stats
        self.step_totals = StepTotals()
        self.failure: Exception | None = None
        self.is_draining = False

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its latest step."""
        return self._stats

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step under way; what is unfinished fails."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._fail(RuntimeError("the server is shutting down"))

    def drain(self) -> None:
        """Take on nothing more; what is admitted may finish."""
        self.is_draining = True

    @property
    def is_idle(self) -> bool:
        """Nothing is admitted that is not finished."""
        return not self._streams

    def check_room(self, num_prompts: int) -> None:
        """Raise what `submit` would raise for so many prompts, whatever they say."""
        if self.failure is not None:
            raise EngineFailedError(f"the engine has failed: {self.failure}")
        if self.is_draining:
            raise DrainingError("the server is shutting down")
        if num_prompts > self._max_requests:
            raise RequestError(
                f"prompt holds {num_prompts} prompts, more than the {self._max_requests} that the "
                "server takes on at a time"
            )
        if len(self._streams) + num_prompts > self._max_requests:
            raise QueueFullError(f"the server holds {len(self._streams)} requests; try again later")

    async def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, timeout: float | None = None
    ) -> OutputStream:
        """Queue one request per prompt of token ids, to be finished within `timeout` seconds.

        Raises RequestError if one of them can never be served, else a ServingError.
        """
        self.check_room(len(prompts))
        stream = OutputStream(len(prompts), self._forget)
        if timeout is not None:
            stream.expire_in(timeout)
        self._streams |= dict.fromkeys(stream.request_ids, stream)
        self._commands.put(partial(self._add, list(stream.request_ids), prompts, params))
        try:
            await stream.wait_until_admitted()
        except BaseException:
            stream.close()
            raise
        return stream

    def _forget(self, stream: OutputStream) -> None:
        for request_id in stream.request_ids:
            if self._streams.pop(request_id, None) is not None:
                self._commands.put(partial(self._engine.abort, request_id))

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._carry_out_commands():
                start = time.perf_counter()
                outputs = self._engine.step()
                self.step_totals = self.step_totals.with_step(time.perf_counter() - start)
                self._stats = self._engine.stats
                self._call_soon(self._deliver, outputs)
        except Exception as error:
            logger.exception("the engine failed")
            self._call_soon(self._fail, error)

    def _carry_out_commands(self) -> bool:
        """Carry out what is asked, waiting while there is nothing else to do; False is the end."""
        while not self._engine.has_unfinished or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            self._stats = self._engine.stats
        return True

    def _add(
        self, request_ids: list[str], prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        event: _Event = _ADMITTED
        try:
            for request_id, prompt in zip(request_ids, prompts, strict=True):
                self._engine.add_request(request_id, prompt, params)
        except RequestError as error:
            event = error
        self._call_soon(self._put, request_ids[0], event)

    def _call_soon(self, callback: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    # On the event loop's thread.

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._put(output.request_id, (output,))
            if output.finished:
                self._streams.pop(output.request_id, None)

    def _put(self, request_id: str, event: _Event) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(event)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        failed = EngineFailedError(f"the engine has failed: {error}")
        for stream in set(self._streams.values()):
            stream.put(failed)
        self._streams.clear()
