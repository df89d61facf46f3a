"""What the server needs of an engine, wherever it runs: admission, streams of outputs, a state."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from qserve.engine.engine import EngineStats
from qserve.engine.request import RequestError, RequestOutput, SamplingParams

Event = Sequence[RequestOutput] | Exception
"""What arrives from an engine: outputs, or why there will be no more."""

ADMITTED: tuple[RequestOutput, ...] = ()
"""The first event of requests that were taken on."""


class ServingError(Exception):
    """A request was not taken on or not finished, through no fault of its own."""


class QueueFullError(ServingError):
    """The server already holds as many requests as it may."""


class UnavailableError(ServingError):
    """The server is shutting down, or what would serve the request is not there now."""


class RequestTimeoutError(ServingError):
    """A request was not finished in its time."""


class EngineFailedError(ServingError):
    """The engine has ended with an error; nothing will be served any more."""


@dataclass(frozen=True)
class StepTotals:
    """The engine's steps since it was started, and the seconds they took."""

    steps: int = 0
    seconds: float = 0.0

    def __add__(self, other: StepTotals) -> StepTotals:
        return StepTotals(self.steps + other.steps, self.seconds + other.seconds)


class OutputStream:
    """What the engine produces for prompts that were submitted together.

    Iterating gives lists of outputs, all that have arrived since the last, until every prompt is
    finished; a ServingError if the engine dies or the time is up. `close` may come at any time, and
    must come.

    num_choices: sequences of each prompt.
    """

    def __init__(
        self, num_prompts: int, num_choices: int, forget: Callable[[OutputStream], None]
    ) -> None:
        group = uuid4().hex
        self.request_ids = {f"{group}-{index}": index for index in range(num_prompts)}
        self.num_choices = num_choices
        self._forget = forget
        self._unfinished = num_prompts
        self._events: list[Event] = []
        self._has_events = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def prompt_index(self, output: RequestOutput) -> int:
        """Which of the submitted prompts an output belongs to."""
        return self.request_ids[output.request_id]

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._has_events.set()

    def expire_in(self, seconds: float) -> None:
        """Let the stream end with RequestTimeoutError, and its pages be freed, after so long."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self.put(RequestTimeoutError(f"the request was not finished within {seconds:g} seconds"))
        self.close()

    async def wait_until_admitted(self) -> None:
        await self._wait_for_events()
        _raise_if_error(self._events.pop(0))

    async def __aiter__(self) -> AsyncIterator[list[RequestOutput]]:
        while self._unfinished:
            await self._wait_for_events()
            events, self._events = self._events, []
            outputs = [output for event in events for output in _outputs(event)]
            self._unfinished -= sum(output.finished for output in outputs)
            if outputs:
                yield outputs
            _raise_if_error(events[-1])  # nothing comes after an error

    async def _wait_for_events(self) -> None:
        while not self._events:
            self._has_events.clear()
            await self._has_events.wait()

    def close(self) -> None:
        """Abort what is unfinished and free its pages."""
        if self._timer is not None:
            self._timer.cancel()
        self._forget(self)


def _outputs(event: Event) -> Sequence[RequestOutput]:
    return () if isinstance(event, Exception) else event


def _raise_if_error(event: Event) -> None:
    if isinstance(event, Exception):
        raise event


class SharedEngine(ABC):
    """An engine that the coroutines of one event loop share.

    max_requests: sequences held at a time, running and waiting together.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._streams: dict[str, OutputStream] = {}
        self.is_draining = False

    @abstractmethod
    def start(self) -> None:
        """Begin to serve; to be called on the event loop that then submits."""

    @abstractmethod
    async def stop(self) -> None:
        """End; what is unfinished fails."""

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """The engine's state a moment ago."""

    @property
    @abstractmethod
    def step_totals(self) -> StepTotals: ...

    @property
    @abstractmethod
    def failure(self) -> Exception | None:
        """What has ended the engine for good."""

    @abstractmethod
    def _begin(
        self, stream: OutputStream, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        """Have the prompts computed; their events go to `_deliver`, or to the stream itself."""

    @abstractmethod
    def _abort(self, stream: OutputStream, request_ids: Sequence[str]) -> None:
        """Let go of what a stream has not finished."""

    def drain(self) -> None:
        """Take on nothing more; what is admitted may finish."""
        self.is_draining = True

    @property
    def is_idle(self) -> bool:
        """Nothing is admitted that is not finished."""
        return not self._streams

    def check_ready(self) -> None:
        """Raise a ServingError while no request is taken on, whatever it asks for."""
        if self.failure is not None:
            raise EngineFailedError(f"the engine has failed: {self.failure}")
        if self.is_draining:
            raise UnavailableError("the server is shutting down")

    def check_room(self, num_prompts: int, num_choices: int) -> None:
        """Raise what `submit` would raise for so many choices of so many prompts."""
        self.check_ready()
        wanted = num_prompts * num_choices
        if wanted > self._max_requests:
            raise RequestError(
                f"{'n' if num_prompts == 1 else 'prompt'} asks for {wanted} sequences, more than "
                f"the {self._max_requests} that the server takes on at a time"
            )
        held = sum(stream.num_choices for stream in self._streams.values())
        if held + wanted > self._max_requests:
            raise QueueFullError(f"the server holds {held} sequences; try again later")

    async def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, timeout: float | None = None
    ) -> OutputStream:
        """Queue one request per prompt of token ids, to be finished within `timeout` seconds.

        Raises RequestError if one of them can never be served, else a ServingError.
        """
        self.check_room(len(prompts), params.n)
        stream = OutputStream(len(prompts), params.n, self._forget)
        if timeout is not None:
            stream.expire_in(timeout)
        self._streams |= dict.fromkeys(stream.request_ids, stream)
        self._begin(stream, prompts, params)
        try:
            await stream.wait_until_admitted()
        except BaseException:
            stream.close()
            raise
        return stream

    def _forget(self, stream: OutputStream) -> None:
        unfinished = [i for i in stream.request_ids if self._streams.pop(i, None) is not None]
        if unfinished:
            self._abort(stream, unfinished)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put((output,))
            if output.finished:
                self._streams.pop(output.request_id, None)

    def _fail_all(self, error: ServingError) -> None:
        """End every stream with an error."""
        for stream in set(self._streams.values()):
            stream.put(error)
        self._streams.clear()
