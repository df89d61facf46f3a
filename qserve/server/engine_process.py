"""The engine in a process of its own, so that neither it nor the server waits for the other's
Python."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from traceback import format_exc
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from qserve.engine.engine import EngineStats
from qserve.server.async_engine import LoopedEngine
from qserve.server.engine_loop import Command, EngineLoop, Failure, Report, ServedEngine

_ENDED = Failure("its process has ended")


@dataclass(frozen=True)
class _Trouble:
    """What kept the engine from being loaded, and where, which an error does not carry along."""

    error: Exception
    traceback: str


class LoadedEngine(ServedEngine, Protocol):
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...


class EngineProcess(LoopedEngine):
    """Runs an engine that `load` makes in another process. max_requests: sequences held at a time.

    Waits until it is ready; raises what `load` raises.
    """

    def __init__(self, load: Callable[[], LoadedEngine], max_requests: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_run, args=(load, theirs), name="qserve-engine", daemon=True
        )
        self._process.start()
        atexit.register(self._process.kill)  # unless `stop` comes first
        theirs.close()
        self.tokenizer, stats = self._wait_until_ready()
        super().__init__(stats, max_requests)

    def _wait_until_ready(self) -> tuple[PreTrainedTokenizerBase, EngineStats]:
        try:
            ready: tuple[PreTrainedTokenizerBase, EngineStats] | _Trouble
            ready = self._connection.recv()
        except EOFError as error:
            raise RuntimeError("the engine's process has ended before it was ready") from error
        if isinstance(ready, _Trouble):
            raise ready.error from RuntimeError(ready.traceback)
        return ready

    def start(self) -> None:
        super().start()
        self._reader = Thread(target=self._read, name="qserve-reports", daemon=True)
        self._reader.start()

    async def stop(self) -> None:
        """End the process after the step under way; what is unfinished fails."""
        self._give(None)
        await asyncio.to_thread(self._process.join)
        atexit.unregister(self._process.kill)
        self._fail("the server is shutting down")

    def _give(self, command: Command | None) -> None:
        with suppress(OSError):  # it has ended, as `_read` finds out
            self._connection.send(command)

    def _read(self) -> None:
        """On a thread of its own: pass on reports until the process has ended."""
        try:
            while True:
                self._report(self._connection.recv())
        except (EOFError, OSError):
            self._report(_ENDED)


# In the engine's process.


def _run(load: Callable[[], LoadedEngine], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the server decides
    try:
        engine = load()
    except Exception as error:
        connection.send(_Trouble(error, format_exc()))
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # likewise a service manager
    with suppress(OSError):  # the server is gone, as `_pass_on_commands` finds out
        connection.send((engine.tokenizer, engine.stats))
    reports: SimpleQueue[bytes | None] = SimpleQueue()
    loop = EngineLoop(engine, lambda report: reports.put(_packed(report)))
    Thread(target=_pass_on_commands, args=(connection, loop), daemon=True).start()
    sender = Thread(target=_send_reports, args=(reports, connection))
    sender.start()
    loop.run()
    reports.put(None)
    sender.join()


def _packed(report: Report) -> bytes:
    return pickle.dumps(report, pickle.HIGHEST_PROTOCOL)


def _pass_on_commands(connection: Connection, loop: EngineLoop) -> None:
    command: Command | None = None
    try:
        while (command := connection.recv()) is not None:
            loop.give(command)
    except (EOFError, OSError):  # the server is gone
        pass
    loop.give(None)


def _send_reports(reports: SimpleQueue[bytes | None], connection: Connection) -> None:
    """On a thread of its own: a server that is late must not hold up the engine."""
    try:
        while (report := reports.get()) is not None:
            connection.send_bytes(report)
    except OSError:  # the server is gone
        pass
