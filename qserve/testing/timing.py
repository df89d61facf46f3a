"""GPU timing that can be trusted: CUDA graphs, cold weights, peers interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median over rounds, and the spread (largest - smallest)."""

    median: float
    spread: float


def time_interleaved(peers: Mapping[Name, Sequence[Call]], rounds: int = 7) -> dict[Name, Timing]:
    """Time each peer's calls as one CUDA graph; rounds alternate between the peers.

    The calls of a peer should differ in their weights, together larger than the L2 cache, so that
    every call finds its weights cold, as in a model. A replay is timed behind another one, every
    other round runs backwards, and the GPU rests twice as long as it has worked, so that no peer pays
    for another's heat.
    """
    graphs = {name: _capture(calls) for name, calls in peers.items()}
    times: dict[Name, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        for name in list(peers)[:: -1 if turn % 2 else 1]:
            elapsed = _replay(graphs[name])
            times[name].append(elapsed / len(peers[name]))
            time.sleep(2e-6 * elapsed)
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
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def sustained(peers: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, dict[str, float]]:
    """Each peer's calls, over and over for `seconds`, in both orders: the means of microseconds for
    all of its calls once, of the clock in megahertz and of the power in watts, half-way through.

    A peer runs as long before its time is taken: until then the clock is still what the one before it
    has left."""
    graphs = {name: _capture(calls) for name, calls in peers.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    for name in (*graphs, *reversed(graphs)):
        _run_for(graphs[name], seconds)
        runs[name].append(_run_for(graphs[name], seconds))
    return {
        name: {key: statistics.mean(run[key] for run in taken) for key in taken[0]}
        for name, taken in runs.items()
    }


def _run_for(graph: torch.cuda.CUDAGraph, seconds: float) -> dict[str, float]:
    replays = max(1, int(seconds / (_replay(graph) * 1e-6)))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    time.sleep(seconds / 2)
    clock, watts = float(torch.cuda.clock_rate()), torch.cuda.power_draw() / 1e3
    end.synchronize()
    elapsed = start.elapsed_time(end) * 1e3 / replays
    return {"microseconds": elapsed, "megahertz": clock, "watts": watts}
