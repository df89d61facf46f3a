"""GPU timing that can be trusted: CUDA graphs, cold weights, peers interleaved, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median over rounds, and the spread (largest - smallest)."""

    median: float
    spread: float


def time_interleaved(peers: Mapping[str, Sequence[Call]], rounds: int = 7) -> dict[str, Timing]:
    """Time each peer's calls as one CUDA graph; rounds alternate between the peers.

    The calls of a peer should differ in their weights, together larger than the L2 cache, so that
    every call finds its weights cold, as in a model.
    """
    graphs = {name: _capture(calls) for name, calls in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(_replay(graph) / len(peers[name]))
    return {name: Timing(statistics.median(t), max(t) - min(t)) for name, t in times.items()}


def copies_beyond_cache(nbytes: int, cache_bytes: int = 256 << 20, least: int = 4) -> int:
    """How many copies of a tensor of `nbytes` it takes to find none of them in the L2 cache."""
    return max(least, -(-cache_bytes // nbytes))


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
