"""An engine at work: it steps, takes commands between steps, and reports what comes of both."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from qserve.engine.engine import EngineStats
from qserve.engine.request import RequestError, RequestOutput, SamplingParams
from qserve.server.shared_engine import StepTotals

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


@dataclass(frozen=True)
class Prepare:
    """Do beforehand what would hold up `Add`; a report of the same key says when it is done."""

    key: str
    params: SamplingParams


@dataclass(frozen=True)
class Add:
    """Take on prompts that belong together."""

    request_ids: Sequence[str]
    prompts: Sequence[list[int]]
    params: SamplingParams


@dataclass(frozen=True)
class Abort:
    request_ids: Sequence[str]


@dataclass(frozen=True)
class Prepared:
    key: str
    error: Exception | None


@dataclass(frozen=True)
class Admission:
    """What came of `Add`; of requests that are refused, some may have been added."""

    request_ids: Sequence[str]
    error: RequestError | None


@dataclass(frozen=True)
class Progress:
    """What a step or a command has changed."""

    outputs: Sequence[RequestOutput]
    stats: EngineStats
    step_totals: StepTotals


@dataclass(frozen=True)
class Failure:
    """The engine has ended for good."""

    error: str


Command = Prepare | Add | Abort
Report = Prepared | Admission | Progress | Failure


class EngineLoop:
    """Runs an engine. report: is called from several threads, and must not wait."""

    def __init__(self, engine: ServedEngine, report: Callable[[Report], None]) -> None:
        self._engine = engine
        self._report = report
        self._commands: SimpleQueue[Add | Abort | None] = SimpleQueue()
        self._preparing = ThreadPoolExecutor(thread_name_prefix="qserve-prepare")
        self._totals = StepTotals()

    def give(self, command: Command | None) -> None:
        """Have a command carried out; None is the last. Any thread may call."""
        if isinstance(command, Prepare):
            self._preparing.submit(self._prepare, command)
        else:
            self._commands.put(command)

    def run(self) -> None:
        """Step whenever there is something to do, until the last command or a failure."""
        try:
            while self._carry_out_commands():
                start = time.perf_counter()
                outputs = self._engine.step()
                self._totals += StepTotals(1, time.perf_counter() - start)
                self._report_progress(outputs)
        except Exception as error:
            logger.exception("the engine failed")
            self._report(Failure(str(error)))
        finally:
            self._preparing.shutdown(wait=False)

    def _carry_out_commands(self) -> bool:
        """Carry out what is asked, waiting while there is nothing else to do; False is the end."""
        while not self._engine.has_unfinished or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            if isinstance(command, Add):
                self._report(Admission(command.request_ids, self._add(command)))
            else:
                self._abort(command)
            self._report_progress(())
        return True

    def _add(self, command: Add) -> RequestError | None:
        try:
            for request_id, prompt in zip(command.request_ids, command.prompts, strict=True):
                self._engine.add_request(request_id, prompt, command.params)
        except RequestError as error:
            return error
        return None

    def _abort(self, command: Abort) -> None:
        for request_id in command.request_ids:
            self._engine.abort(request_id)

    def _prepare(self, command: Prepare) -> None:
        error: Exception | None = None
        try:
            self._engine.prepare(command.params)
        except RequestError as refusal:
            error = refusal
        except BaseException as bug:  # a library's panic is no Exception; a client waits for a word
            logger.exception("a request could not be prepared")
            error = RuntimeError(str(bug))
        self._report(Prepared(command.key, error))

    def _report_progress(self, outputs: Sequence[RequestOutput]) -> None:
        self._report(Progress(outputs, self._engine.stats, self._totals))
