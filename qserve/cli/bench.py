"""Commands for those who care about speed: benchmarks, and compiling kernels ahead of time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from qserve.cli.model import load_engine
from qserve.cli.options import API_KEY_VARIABLE, KVBits, Precision, bits_of
from qserve.config import EngineConfig

bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
kernels = typer.Typer(help="The CUDA kernels.", no_args_is_help=True)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per run.")]


def _require_gpu() -> None:
    """Raise ConfigError where there is no GPU to measure."""
    from qserve.engine.loading import resolve_device

    resolve_device("cuda")


@bench.command()
def throughput(
    model: Annotated[
        str | None, typer.Argument(help="A model, unless --config names one.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json, or its directory, for --dummy-weights.")
    ] = None,
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="Random weights: config.json suffices.")
    ] = False,
    group_size: Annotated[
        Literal["-1", "64", "128"], typer.Option(help="Of dummy weights; -1: a scale per channel.")
    ] = "128",
    num_requests: Annotated[int, typer.Option(help="Requests, all at once.", min=1)] = 64,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens generated for each.", min=1)] = 512,
    max_batch: Annotated[
        int | None, typer.Option(help="Requests that run together; all of them by default.", min=1)
    ] = None,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Also where a decode step's time goes, by kernel.")
    ] = False,
    precision: Precision = None,
    kv: KVBits = None,
    as_json: Json = False,
) -> None:
    """Tokens per second offline, prefill included, with random prompts."""
    import torch

    from qserve.benchmark.breakdown import bench_breakdown
    from qserve.benchmark.dummy import dummy_engine
    from qserve.benchmark.throughput import bench_throughput

    if (model is None) == (config is None) or dummy_weights != (config is not None):
        raise typer.BadParameter("give either MODEL, or --config with --dummy-weights")
    if breakdown and (config is None or not torch.cuda.is_available()):
        raise typer.BadParameter("--breakdown is for --dummy-weights on a GPU")
    limits = EngineConfig(
        max_num_sequences=max_batch or num_requests,
        max_model_len=input_len + output_len,
        kv_bits=bits_of(kv),
    )
    if config is None:
        engine = load_engine(str(model), precision, limits)
    else:
        engine = dummy_engine(config, int(group_size), limits)
    result = bench_throughput(engine, num_requests, input_len, output_len)
    parts = None
    if breakdown:
        parts = bench_breakdown(engine, int(group_size), result.largest_batch, input_len)
    if as_json:
        print(json.dumps(result.to_json() | ({"breakdown": parts.to_json()} if parts else {})))
        return
    for name, value in result.to_json().items():
        print(f"{name.replace('_', ' '):28} {value:,.6g}")
    if parts:
        print(parts)


@bench.command()
def serving(
    url: Annotated[str, typer.Argument(help="Of an OpenAI server, such as http://host:8000.")],
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests per second; may be repeated.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Instead: lines of JSON: timestamp, input_len, output_len.",
        ),
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests at each rate.", min=1)] = 200,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens generated for each.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Of the arrivals and the prompts.")] = 0,
    ttft: Annotated[
        float | None, typer.Option(help="Milliseconds to the first token that are still good.")
    ] = None,
    tpot: Annotated[
        float | None, typer.Option(help="Milliseconds per further token that are still good.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Latency of a server under load: requests at random times, or at those of a trace."""
    from qserve.benchmark.serving import (
        Objectives,
        bench_serving,
        poisson_arrivals,
        read_trace,
    )

    if (rate is None) == (trace is None):
        raise typer.BadParameter("give either --rate or --trace")
    loads = [
        (value, poisson_arrivals(value, num_requests, input_len, output_len, seed))
        for value in rate or ()
    ]
    runs = loads if trace is None else [(None, read_trace(trace))]
    key = os.environ.get(API_KEY_VARIABLE)
    for value, arrivals in runs:
        objectives = Objectives(ttft, tpot)
        report = bench_serving(url.rstrip("/"), arrivals, objectives, seed, value, key)
        print(json.dumps(report.to_json()) if as_json else report, flush=True)


@bench.command("kernels")
def kernels_(
    family: Annotated[
        list[str] | None, typer.Option(help="Such as llama-3-8b; may be repeated. Default: all.")
    ] = None,
    sustained: Annotated[
        bool, typer.Option(help="Time long runs at the power cap instead, with clock and power.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Linears and producers against the libraries' kernels and the hardware's ceilings."""
    from qserve.benchmark.kernels import bench_kernels, bench_sustained
    from qserve.benchmark.workloads import FAMILIES

    unknown = set(family or ()) - set(FAMILIES)
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(FAMILIES)}")
    _require_gpu()
    if sustained:
        bench_sustained()
    else:
        bench_kernels(tuple(family or FAMILIES), as_json=as_json)


@bench.command()
def attention(as_json: Json = False) -> None:
    """Attention over quantized pages, and the append kernel, against the copy bandwidth."""
    from qserve.benchmark.attention import bench_paged

    _require_gpu()
    bench_paged(as_json)


@bench.command()
def sampling(as_json: Json = False) -> None:
    """Drawing tokens under several settings, against torch's way and one read of the logits."""
    from qserve.benchmark.sampling import bench_sampling

    _require_gpu()
    bench_sampling(as_json)


@kernels.command("compile")
def compile_(
    arch: Annotated[list[str], typer.Option(help="Such as sm_80 or sm_90a; may be repeated.")],
) -> None:
    """Compile every kernel variant into the cache; needs no GPU. Prints what each one takes."""
    from qserve.kernels.compile import compile_kernels

    compile_kernels(arch)
