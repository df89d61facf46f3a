"""Commands for those who care about speed: benchmarks, and compiling kernels ahead of time."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qserve.cli.model import load_engine
from qserve.cli.options import KVBits, Model, Precision, bits_of

bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
kernels = typer.Typer(help="The CUDA kernels.", no_args_is_help=True)


@bench.command()
def throughput(
    model: Model,
    requests: Annotated[int, typer.Option(help="Requests, all at once.", min=1)] = 64,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens generated for each.", min=1)] = 512,
    precision: Precision = None,
    kv: KVBits = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokens per second offline, prefill included, with random prompts."""
    from qserve.benchmark.throughput import bench_throughput

    engine = load_engine(model, precision, bits_of(kv))
    result = bench_throughput(engine, requests, input_len, output_len).to_json()
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name.replace('_', ' '):28} {value:,.6g}")


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
    if sustained:
        bench_sustained()
    else:
        bench_kernels(tuple(family or FAMILIES), as_json=as_json)


@bench.command()
def attention() -> None:
    """Decode attention over quantized pages, and the append kernel, against the copy bandwidth."""
    from qserve.benchmark.attention import bench_paged

    bench_paged()


@kernels.command("compile")
def compile_(
    arch: Annotated[list[str], typer.Option(help="Such as sm_80 or sm_90a; may be repeated.")],
) -> None:
    """Compile every kernel variant into the cache; needs no GPU. Prints what each one takes."""
    from qserve.kernels.compile import compile_kernels

    compile_kernels(arch)
