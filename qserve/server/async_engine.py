"""The engine on a thread of this process, shared by the coroutines of one event loop."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from uuid import uuid4

from qserve.engine.engine import EngineStats
from qserve.engine.request import SamplingParams
from qserve.server.engine_loop import (
    Abort,
    Add,
    Admission,
    Command,
    EngineLoop,
    Failure,
    Prepare,
    Prepared,
    Progress,
    Report,
    ServedEngine,
)
from qserve.server.shared_engine import (
    ADMITTED,
    EngineFailedError,
    OutputStream,
    SharedEngine,
    StepTotals,
)


class LoopedEngine(SharedEngine):
    """An engine whose loop runs beside the event loop. stats: of the engine before its first step."""

    def __init__(self, stats: EngineStats, max_requests: int) -> None:
        super().__init__(max_requests)
        self._stats = stats
        self._step_totals = StepTotals()
        self._failure: Exception | None = None
        self._preparing: dict[str, asyncio.Future[Exception | None]] = {}

    @abstractmethod
    def _give(self, command: Command | None) -> None:
        """Pass a command on to the loop; its reports go to `_report`."""

    def start(self) -> None:
        self._event_loop = asyncio.get_running_loop()

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def step_totals(self) -> StepTotals:
        return self._step_totals

    @property
    def failure(self) -> Exception | None:
        return self._failure

    async def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, timeout: float | None = None
    ) -> OutputStream:
        if params.grammar is not None:
            await self._prepare(params)
        return await super().submit(prompts, params, timeout)

    async def _prepare(self, params: SamplingParams) -> None:
        self.check_ready()
        key = uuid4().hex
        self._preparing[key] = asyncio.get_running_loop().create_future()
        self._give(Prepare(key, params))
        try:
            error = await self._preparing[key]
        finally:
            del self._preparing[key]
        if error is not None:
            raise error

    def _begin(
        self, stream: OutputStream, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        self._give(Add(tuple(stream.request_ids), prompts, params))

    def _abort(self, stream: OutputStream, request_ids: Sequence[str]) -> None:
        self._give(Abort(tuple(request_ids)))

    def _report(self, report: Report) -> None:
        """Take a report, on any thread."""
        with suppress(RuntimeError):  # the event loop has ended
            self._event_loop.call_soon_threadsafe(self._take, report)

    def _take(self, report: Report) -> None:
        match report:
            case Progress(outputs, stats, step_totals):
                self._stats, self._step_totals = stats, step_totals
                self._deliver(outputs)
            case Admission(request_ids, error):
                stream = self._streams.get(request_ids[0])
                if stream is not None:
                    stream.put(error or ADMITTED)
            case Prepared(key, error):
                if key in self._preparing and not self._preparing[key].done():
                    self._preparing[key].set_result(error)
            case Failure(error) if self._failure is None:
                self._fail(error)

    def _fail(self, reason: str) -> None:
        self._failure = RuntimeError(reason)
        failed = EngineFailedError(f"the engine has failed: {reason}")
        self._fail_all(failed)
        for preparing in self._preparing.values():
            if not preparing.done():
                preparing.set_exception(failed)


class AsyncEngine(LoopedEngine):
    """Runs an engine of this process. max_requests: sequences held at a time."""

    def __init__(self, engine: ServedEngine, max_requests: int) -> None:
        super().__init__(engine.stats, max_requests)
        self._loop = EngineLoop(engine, self._report)
        self._thread = Thread(target=self._loop.run, name="qserve-engine", daemon=True)

    def start(self) -> None:
        super().start()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step under way; what is unfinished fails."""
        self._give(None)
        await asyncio.to_thread(self._thread.join)
        self._fail("the server is shutting down")

    def _give(self, command: Command | None) -> None:
        self._loop.give(command)
