"""Which replica a prompt goes to: the one whose cache holds most of it, while it is not too busy."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

CHUNK_TOKENS = 64
"""As many as a page of the cache holds: only whole pages are found again."""

MAX_CHUNKS = 100_000
"""Beginnings of prompts that are remembered, the latest used."""

MAX_LEAD = 16
"""Requests that the replica which knows a prompt may hold beyond the least busy one."""


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Routes requests by the first prompt of their first argument; else to the least busy replica.

    What a replica has been sent stands for what its cache holds; both forget the least used first.
    """

    def initialize_state(self, **_: Any) -> None:
        self._holders: OrderedDict[int, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred first; Ray takes the least busy of a rank."""
        anyone = random.sample(candidate_replicas, len(candidate_replicas))
        holder = self._holder(anyone, pending_request) if pending_request else None
        return [anyone] if holder is None else [[holder], anyone]

    def on_request_routed(self, request: PendingRequest, replica_id: ReplicaID, _: Any) -> None:
        for key in _beginnings(request.args[0][0]):
            self._holders[key] = replica_id
            self._holders.move_to_end(key)
        while len(self._holders) > MAX_CHUNKS:
            self._holders.popitem(last=False)

    def _holder(
        self, replicas: Sequence[RunningReplica], request: PendingRequest
    ) -> RunningReplica | None:
        """The replica that was sent the longest beginning, unless it leads by too many requests."""
        by_id = {replica.replica_id: replica for replica in replicas}
        known = [self._holders.get(key) for key in _beginnings(request.args[0][0])]
        holder = next((by_id[i] for i in reversed(known) if i in by_id), None)
        if holder is None or self._load(holder) - min(map(self._load, replicas)) > MAX_LEAD:
            return None
        return holder

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _beginnings(prompt: Sequence[int]) -> Iterator[int]:
    """A key for each beginning of the prompt that is whole chunks long, the shortest first."""
    key = 0
    for end in range(CHUNK_TOKENS, len(prompt) + 1, CHUNK_TOKENS):
        key = hash((key, *prompt[end - CHUNK_TOKENS : end]))
        yield key
