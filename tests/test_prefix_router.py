"""Which replica a prompt is routed to, without any that run."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID

from qserve.config import ConfigError
from qserve.server import prefix_router, replicas
from qserve.server.prefix_router import CHUNK_TOKENS, MAX_LEAD, PrefixRouter

REPLICAS = [SimpleNamespace(replica_id=name) for name in "abc"]
SHARED = list(range(2 * CHUNK_TOKENS))


class Routing:
    """A router over replicas that are busy with so many requests each."""

    def __init__(self, **busy: int) -> None:
        self.router = PrefixRouter(DeploymentID("name", "app"), DeploymentHandleSource.UNKNOWN)
        self.router.initialize_state()
        for name, queue_len in busy.items():
            self.router.replica_queue_len_cache.update(name, queue_len)

    def preferred(self, prompt: list[int], candidates: list[Any] = REPLICAS) -> str | None:
        """The replica that the prompt is kept for, if one is."""
        ranks = asyncio.run(self.router.choose_replicas(candidates, _request(prompt)))
        assert sorted(r.replica_id for r in ranks[-1]) == [r.replica_id for r in candidates]
        return ranks[0][0].replica_id if len(ranks) > 1 else None

    def routed(self, prompt: list[int], replica: str) -> None:
        self.router.on_request_routed(_request(prompt), replica, None)


def _request(prompt: list[int]) -> Any:
    return SimpleNamespace(args=[[prompt]])


def test_longest_known_beginning_decides() -> None:
    routing = Routing()
    assert routing.preferred([*SHARED, 1]) is None
    routing.routed(SHARED[:CHUNK_TOKENS], "a")
    routing.routed([*SHARED, 1], "b")
    assert routing.preferred(SHARED[:CHUNK_TOKENS]) == "b"  # the last that was sent it
    routing.routed(SHARED[:CHUNK_TOKENS], "a")
    assert routing.preferred(SHARED[: CHUNK_TOKENS + 1]) == "a"
    assert routing.preferred([*SHARED, 2, 3]) == "b"
    assert routing.preferred(SHARED[1:]) is None
    assert routing.preferred(SHARED[: CHUNK_TOKENS - 1]) is None


@pytest.mark.parametrize(("lead", "kept"), [(MAX_LEAD, True), (MAX_LEAD + 1, False)])
def test_a_busy_holder_is_spared(lead: int, kept: bool) -> None:
    routing = Routing(a=3 + lead, b=3, c=9)
    routing.routed(SHARED, "a")
    assert routing.preferred(SHARED) == ("a" if kept else None)


def test_a_holder_that_is_gone_is_passed_over() -> None:
    routing = Routing()
    routing.routed(SHARED[:CHUNK_TOKENS], "a")
    routing.routed([*SHARED[:CHUNK_TOKENS], *[7] * CHUNK_TOKENS], "c")
    routing.routed(SHARED[:CHUNK_TOKENS], "a")
    longer = [*SHARED[:CHUNK_TOKENS], *[7] * CHUNK_TOKENS]
    assert routing.preferred(longer) == "c"
    assert routing.preferred(longer, REPLICAS[:2]) == "a"


def test_the_least_used_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_router, "MAX_CHUNKS", 2)
    prompts = [[number] * CHUNK_TOKENS for number in range(3)]
    routing = Routing()
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        routing.routed(prompt, "a")
    assert [routing.preferred(prompt) for prompt in prompts] == ["a", None, "a"]


@pytest.mark.parametrize(
    ("resources", "message"),
    [({"GPU": 2.0, "CPU": 64.0}, "a GPU each, and there are 2"), ({"CPU": 1.0}, "CPU each")],
)
def test_a_device_for_each_replica(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], message: str
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    with pytest.raises(ConfigError, match=message):
        replicas.start_replicas(lambda: pytest.fail("loaded"), 3)
