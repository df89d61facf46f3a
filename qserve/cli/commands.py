"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import qserve
from qserve.cli.bench import bench, kernels
from qserve.cli.evaluate import evaluate
from qserve.cli.model import DEFAULT_RECIPE, display_name, load_engine, quantize_model
from qserve.cli.options import (
    GROUP_SIZES,
    Calibration,
    GroupSizeOption,
    KVBits,
    Model,
    Precision,
    bits_of,
)
from qserve.config import EngineConfig, ServerConfig

app = typer.Typer(
    help="W4A8KV4 quantization and serving of language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for group, name in ((evaluate, "evaluate"), (bench, "bench"), (kernels, "kernels")):
    app.add_typer(group, name=name)


SERVER = ServerConfig()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qserve {qserve.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the checkpoint goes.")],
    recipe: Annotated[str, typer.Option(help="How to quantize.")] = DEFAULT_RECIPE,
    group_size: GroupSizeOption = "auto",
    calibration: Calibration = None,
    wide: Annotated[
        list[str] | None,
        typer.Option(help="Linears to keep at 8 bits: mlp.down_proj, or 'model.layers.0.*'."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which windows of the text to calibrate with.")] = 0,
) -> None:
    """Quantize a model to W4A8KV4; an existing checkpoint is replaced once the new one is whole."""
    from qserve.models.source import open_source

    size = GROUP_SIZES[group_size]
    quantize_model(open_source(model), output, recipe, size, calibration, tuple(wide or ()), seed)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes the tokens reproducible.")] = None,
    precision: Precision = None,
    kv: KVBits = None,
) -> None:
    """Continue a text, on stdout."""
    from qserve.engine.request import SamplingParams
    from qserve.engine.text import encode

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    engine = load_engine(model, precision, EngineConfig(kv_bits=bits_of(kv)))
    engine.add_request("0", encode(engine.tokenizer, prompt), params)
    while engine.has_unfinished:
        for output in engine.step():
            print(output.outputs[0].text, end="", flush=True)
    print()


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = SERVER.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.")] = SERVER.port,
    precision: Precision = None,
    kv: KVBits = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output; default: as the model.")
    ] = None,
    max_num_sequences: Annotated[
        int | None, typer.Option(help="Sequences that decode together; default: by the device.")
    ] = None,
    max_batched_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a step: fewer for latency, more for throughput (default)."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of the memory beside the weights to use.")
    ] = EngineConfig.gpu_memory_utilization,
    max_requests: Annotated[
        int, typer.Option(help="Sequences held at a time; more are refused with 429.")
    ] = SERVER.max_requests,
    max_body_bytes: Annotated[
        int, typer.Option(help="Longest body; a longer one is refused with 413.")
    ] = SERVER.max_body_bytes,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds a request may take; then it ends with 504.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line; also one in QSERVE_API_KEY.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web site whose pages may use the server; or *.")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="A PEM file, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    tool_parser: Annotated[
        Literal["hermes", "llama3"] | None,
        typer.Option(help="How the model writes calls of tools, if its chat template is silent."),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line of JSON per request to stdout.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(help="Engines on Ray Serve, one a GPU; else one, here.", min=1)
    ] = None,
) -> None:
    """Serve a model over the OpenAI API until interrupted."""
    from qserve.cli.serving import (
        bound_socket,
        check_tls,
        open_engine,
        read_api_keys,
        run_server,
        tracer_from_environment,
    )

    config = ServerConfig(
        host=host,
        port=port,
        max_requests=max_requests,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        api_keys=read_api_keys(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        tool_parser=tool_parser,
        log_requests=log_requests,
    )
    settings = EngineConfig(
        max_num_sequences=max_num_sequences,
        max_batched_tokens=max_batched_tokens,
        max_model_len=max_model_len,
        kv_bits=bits_of(kv),
        gpu_memory_utilization=gpu_memory_utilization,
    )
    check_tls(config)
    tracer = tracer_from_environment()
    with bound_socket(config) as listener:
        engine, tokenizer = open_engine(model, precision, settings, replicas, config.max_requests)
        run_server(engine, tokenizer, display_name(model), listener, config, tracer)


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="A model, or the URL of a server.", show_default=False)
    ],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Makes the answers reproducible.")] = None,
    precision: Precision = None,
    kv: KVBits = None,
) -> None:
    """Chat with a model or a server in the terminal."""
    from qserve.cli.chat import check_options_of_a_server, converse, engine_reply, server_reply
    from qserve.engine.request import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if model.startswith(("http://", "https://")):
        check_options_of_a_server(precision, kv)
        fields = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        reply = server_reply(model, fields)
    else:
        reply = engine_reply(
            load_engine(model, precision, EngineConfig(kv_bits=bits_of(kv))), params
        )
    converse(reply, system)
