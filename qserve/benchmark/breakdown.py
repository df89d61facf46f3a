"""Where the time of a decode step goes, by kernel, beside the time that each part must take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from qserve.benchmark.kernels import Ceilings
from qserve.benchmark.roofline import REST, Roofline
from qserve.benchmark.throughput import add_requests, random_prompts
from qserve.engine.engine import Engine

LAST_OF_STEP = "draw_tokens"
"""The kernel that ends a step; there is one in each."""

PARTS = {
    "GEMM": ("w4a8_gemm",),
    "attention": ("decode_attention", "decode_combine", "decode_plan", "page_gather", "flash_fwd"),
    "append": ("rope_append",),
    "producers": ("rms_norm", "silu_mul", "quantize_per_token"),
    "lm_head": ("gemm", "nvjet", "cutlass", "gemv", "splitKreduce"),
}
"""Part of a step -> what its kernels' names contain; the first part that fits counts, else `REST`."""


class Span(NamedTuple):
    """One kernel or copy on the device; times in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class PartTime:
    """Microseconds of one part per step, measured and by the roofline, and its kernels."""

    name: str
    microseconds: float
    roofline: float
    launches: float

    @property
    def excess(self) -> float:
        """What is lost against the roofline."""
        return self.microseconds - self.roofline

    def line(self, step: float) -> str:
        """A row of the table."""
        return (
            f"{self.name:20s}{self.microseconds:10.1f}{self.microseconds / step:9.1%}"
            f"{self.roofline:10.1f}{self.excess:10.1f}{self.launches:8.0f}"
        )


@dataclass(frozen=True)
class Breakdown:
    """One decode step of `batch` sequences that hold `context` tokens each; microseconds.

    A step lasts, on the device, from the end of one drawing of tokens to the end of the next.
    step: under the profiler, as `parts` and `gaps` are. step_alone: without it. gaps: nothing ran.
    """

    batch: int
    context: int
    step: float
    step_alone: float
    parts: tuple[PartTime, ...]
    gaps: float

    @property
    def accounted(self) -> float:
        """Share of the step that named kernels fill."""
        return sum(part.microseconds for part in self.parts) / self.step

    @property
    def bottleneck(self) -> str:
        """Where most is to be gained: the part farthest above its roofline, or the gaps."""
        excess = {part.name: part.excess for part in self.parts} | {"gaps": self.gaps}
        return max(excess, key=lambda name: excess[name])

    def to_json(self) -> dict[str, Any]:
        """The fields by name, and what follows from them."""
        return asdict(self) | {"accounted": self.accounted, "bottleneck": self.bottleneck}

    def __str__(self) -> str:
        head = f"{'microseconds':20s}{'measured':>10s}{'share':>9s}{'roofline':>10s}"
        gaps = f"{'gaps':20s}{self.gaps:10.1f}{self.gaps / self.step:9.1%}"
        return "\n".join(
            (
                f"batch {self.batch}, context {self.context}: a step takes {self.step_alone:.0f} us "
                f"({self.step:.0f} us under the profiler, of which kernels {self.accounted:.1%})",
                f"{head}{'excess':>10s}{'kernels':>8s}",
                *(part.line(self.step) for part in self.parts),
                gaps,
                f"next bottleneck: {self.bottleneck}",
            )
        )


def bench_breakdown(
    engine: Engine, group_size: int, batch: int, context: int, steps: int = 32
) -> Breakdown:
    """Profile `steps` decode steps of `batch` sequences whose prompts have `context` tokens.

    group_size: of the engine's 4-bit weights. The breakdown's context is what the sequences hold on
    average when their steps are profiled: the first to start have generated a little while others'
    prompts were computed. Raises ValueError if some of them came to their end.
    """
    room = engine.max_model_len - context
    roofline = Roofline(engine.model, engine.kv_format, group_size, Ceilings.measure())
    before = engine.stats.generated_tokens
    add_requests(engine, random_prompts(engine.model.vocab_size, batch, context), room)
    _start_all(engine, batch)
    step_alone = _step_time(engine, steps)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        _step_time(engine, 2 * steps)
    if engine.stats.running != batch:
        raise ValueError(f"{room} tokens of output are too few for a breakdown of {batch} requests")
    held = context + (engine.stats.generated_tokens - before) // batch - steps // 2
    for index in range(batch):
        engine.abort(str(index))
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    step, steady = last_steps(spans, steps)
    parts = _part_times(steady, steps, roofline.part_times(batch, held))
    busy = sum(part.microseconds for part in parts)
    return Breakdown(batch, held, step, step_alone, parts, step - busy)


def last_steps(spans: Iterable[Span], steps: int) -> tuple[float, list[Span]]:
    """The time of a step, and what ran in the last so many.

    Those before are left out: the profiler's start holds up the host, and thereby the device. What a
    step does after its tokens are drawn, which is to copy them, counts for the next.
    """
    ends = sorted(span.end for span in spans if LAST_OF_STEP in span.name)
    begin, end = ends[-1 - steps], ends[-1]
    return (end - begin) / steps, [span for span in spans if begin < span.end <= end]


def own_times(spans: Iterable[Span]) -> list[tuple[str, float]]:
    """Each span's name and the time by which it extends those that began before it.

    Kernels may start before their predecessors end, to wait for them; that time counts once, for
    the predecessor.
    """
    end = 0.0
    times = []
    for span in sorted(spans, key=lambda span: span.start):
        times.append((span.name, max(0.0, span.end - max(span.start, end))))
        end = max(end, span.end)
    return times


def part_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to, by its name."""
    for part, names in PARTS.items():
        if any(name in kernel for name in names):
            return part
    return REST


def _part_times(
    spans: Sequence[Span], steps: int, roofline: dict[str, float]
) -> tuple[PartTime, ...]:
    times: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for name, microseconds in own_times(spans):
        times[part_of(name)] += microseconds
        launches[part_of(name)] += 1
    return tuple(
        PartTime(part, times[part] / steps, roofline.get(part, 0.0), launches[part] / steps)
        for part in (*PARTS, REST)
    )


def _start_all(engine: Engine, batch: int) -> None:
    """Step until every sequence has a token, which waits for the device."""
    started: set[str] = set()
    while len(started) < batch:
        started |= {output.request_id for output in engine.step()}


def _step_time(engine: Engine, steps: int) -> float:
    """Microseconds of the device for a step, where each is launched while the one before runs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    engine.step()
    begin.record()
    for _ in range(steps):
        engine.step()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds * 1e3 / steps
