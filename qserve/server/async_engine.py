"""The engine on a thread of its own, shared by the coroutines of one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from qserve.engine.engine import EngineStats
from qserve.engine.request import RequestError, RequestOutput, SamplingParams
from qserve.server.shared_engine import (
    ADMITTED,
    EngineFailedError,
    Event,
    OutputStream,
    SharedEngine,
    StepTotals,
)

logger = logging.getLogger("qserve.server")


class ServedEngine(Protocol):
    """What of an engine is used; `qserve.engine.engine.Engine` says what it means."""

    def prepare(self, params: SamplingParams) -> None: ...

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    @property
    def has_unfinished(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...


class AsyncEngine(SharedEngine):
    """Runs an engine of this process. max_requests: sequences held at a time."""

    def __init__(self, engine: ServedEngine, max_requests: int) -> None:
        super().__init__(max_requests)
        self._engine = engine
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="qserve-engine", daemon=True)
        self._stats = engine.stats
        self._step_totals = StepTotals()
        self._failure: Exception | None = None

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its latest step."""
        return self._stats

    @property
    def step_totals(self) -> StepTotals:
        return self._step_totals

    @property
    def failure(self) -> Exception | None:
        return self._failure

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step under way; what is unfinished fails."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._fail(RuntimeError("the server is shutting down"))

    async def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, timeout: float | None = None
    ) -> OutputStream:
        if params.grammar is not None:
            await asyncio.to_thread(self._engine.prepare, params)
        return await super().submit(prompts, params, timeout)

    def _begin(
        self, stream: OutputStream, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        self._commands.put(partial(self._add, stream, prompts, params))

    def _abort(self, stream: OutputStream, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._commands.put(partial(self._engine.abort, request_id))

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._carry_out_commands():
                start = time.perf_counter()
                outputs = self._engine.step()
                self._step_totals += StepTotals(1, time.perf_counter() - start)
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
        self, stream: OutputStream, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        event: Event = ADMITTED
        try:
            for request_id, prompt in zip(stream.request_ids, prompts, strict=True):
                self._engine.add_request(request_id, prompt, params)
        except RequestError as error:
            event = error
        self._call_soon(stream.put, event)

    def _call_soon(self, callback: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    # On the event loop's thread.

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._fail_all(EngineFailedError(f"the engine has failed: {error}"))
