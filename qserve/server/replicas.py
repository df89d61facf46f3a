"""Several engines on Ray Serve, one a GPU, behind the interface of one.

The server is where it always is: HTTP, admission, drain and metrics do not change. Ray places the
engines on the machines it knows, watches them, and starts those anew that have ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from qserve.config import ConfigError
from qserve.engine.engine import EngineStats
from qserve.engine.request import RequestError, SamplingParams
from qserve.server.async_engine import AsyncEngine
from qserve.server.engine_loop import ServedEngine
from qserve.server.prefix_router import PrefixRouter
from qserve.server.shared_engine import (
    ADMITTED,
    Event,
    OutputStream,
    ServingError,
    SharedEngine,
    StepTotals,
    UnavailableError,
)

LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)

REPORT_SECONDS = 1.0
"""How often replicas say how they do."""

GATHER_SECONDS = 0.05
"""How long a request's tokens are gathered, after its first, into one message to the server: each
message costs the server a third of a millisecond."""

UNLIMITED = 10**6
"""Sequences that a replica takes on: those who send it requests have counted them."""


@dataclass(frozen=True)
class Report:
    """What a replica says of itself; a replica that is started anew has another id."""

    replica_id: str
    stats: EngineStats
    step_totals: StepTotals


class EngineReplica:
    """An engine in a process of its own. load: makes it."""

    def __init__(self, load: Callable[[], ServedEngine]) -> None:
        self._id = serve.get_replica_context().replica_id.unique_id
        self._engine = AsyncEngine(load(), UNLIMITED)
        self._engine.start()

    async def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, request_ids: Sequence[str]
    ) -> AsyncIterator[Event]:
        """ADMITTED, then outputs; an error that is a request's own or the engine's is an event."""
        try:
            stream = await self._engine.submit(prompts, params)
        except (RequestError, ServingError) as error:
            yield error
            return
        try:
            yield ADMITTED
            async for outputs in stream:
                yield [o._replace(request_id=request_ids[stream.prompt_index(o)]) for o in outputs]
                await asyncio.sleep(GATHER_SECONDS)
        except ServingError as error:
            yield error
        finally:
            stream.close()

    async def report(self) -> Report:
        return Report(self._id, self._engine.stats, self._engine.step_totals)

    async def check_health(self) -> None:
        """Raises once the engine has failed, upon which Ray starts another replica."""
        if self._engine.failure is not None:
            raise self._engine.failure


def start_replicas(load: Callable[[], ServedEngine], count: int) -> DeploymentHandle:
    """Start the engines, and wait until all are ready.

    They run in the cluster that RAY_ADDRESS names, else on this machine, with a GPU each where there
    are any, else with a CPU core each. Raises ConfigError if there are fewer than `count` of those.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(logging_level=logging.WARNING, include_dashboard=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    device = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    available = int(ray.cluster_resources().get(device, 0))
    if count > available:
        raise ConfigError(f"replicas {count} need a {device} each, and there are {available}")
    deployment = serve.deployment(
        EngineReplica,
        num_replicas=count,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(device == "GPU")},
        max_ongoing_requests=UNLIMITED,
        health_check_period_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        logging_config=LOGGING,
    )
    serve.start(proxy_location="Disabled", logging_config=LOGGING)
    name = f"qserve-{uuid.uuid4().hex}"  # servers that share a cluster keep their own replicas
    return serve.run(deployment.bind(load), name=name, route_prefix=None)


class ReplicatedEngine(SharedEngine):
    """The replicas behind a handle, as one engine."""

    def __init__(self, handle: DeploymentHandle, max_requests: int) -> None:
        super().__init__(max_requests)
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._reports: dict[str, Report] = {}
        self._are_gone = False
        self._relays: dict[OutputStream, asyncio.Task[None]] = {}

    @property
    def stats(self) -> EngineStats:
        """The sum over replicas; what those had counted that are gone stays counted."""
        reported = [report.stats for report in self._reports.values()]
        names = [field.name for field in fields(EngineStats)]
        return EngineStats(**{name: sum(getattr(s, name) for s in reported) for name in names})

    @property
    def step_totals(self) -> StepTotals:
        return sum((report.step_totals for report in self._reports.values()), StepTotals())

    @property
    def failure(self) -> None:
        """Ray starts anew what fails."""

    def check_ready(self) -> None:
        super().check_ready()
        if self._are_gone:
            raise UnavailableError("no replica is running now; try again later")

    def start(self) -> None:
        self._watch = asyncio.create_task(self._keep_reports())

    async def stop(self) -> None:
        """End the replicas too."""
        self._watch.cancel()
        self._fail_all(UnavailableError("the server is shutting down"))
        await asyncio.gather(*self._relays.values(), return_exceptions=True)
        await asyncio.to_thread(serve.delete, self._handle.app_name)

    def _begin(
        self, stream: OutputStream, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        relay = asyncio.create_task(self._relay(stream, prompts, params))
        self._relays[stream] = relay
        relay.add_done_callback(lambda _: self._relays.pop(stream))

    def _abort(self, stream: OutputStream, _: Sequence[str]) -> None:
        if stream in self._relays:
            self._relays[stream].cancel()

    async def _relay(
        self, stream: OutputStream, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        """Pass on what a replica sends; cancelled, let it stop."""
        events = self._generate.remote(prompts, params, list(stream.request_ids))
        try:
            async for event in events:
                self._pass_on(stream, event)
        except (RayError, RayServeException):
            stream.put(UnavailableError("the replica that served the request has ended"))
        except asyncio.CancelledError:
            await asyncio.to_thread(events.cancel)
            raise

    def _pass_on(self, stream: OutputStream, event: Event) -> None:
        if isinstance(event, Exception) or event == ADMITTED:
            stream.put(event)
        else:
            self._deliver(event)

    async def _keep_reports(self) -> None:
        while True:
            with suppress(TimeoutError):
                self._take_reports(await self._ask_replicas())
            await asyncio.sleep(REPORT_SECONDS)

    async def _ask_replicas(self) -> list[Report]:
        try:
            answers = self._handle.broadcast("report")
            reports = await answers.results_async(
                timeout_s=10 * REPORT_SECONDS, return_exceptions=True
            )
        except (RayError, RayServeException):
            return []
        return [report for report in reports if isinstance(report, Report)]

    def _take_reports(self, reports: Sequence[Report]) -> None:
        # A new handle knows no replica for a moment, though all are ready.
        self._are_gone = not reports and bool(self._reports)
        gone = {i: replace(r, stats=_ended(r.stats)) for i, r in self._reports.items()}
        self._reports = gone | {report.replica_id: report for report in reports}


def _ended(stats: EngineStats) -> EngineStats:
    """What remains of a replica's state when it is gone: its counts."""
    return replace(stats, running=0, waiting=0, pages_used=0, pages_total=0)
