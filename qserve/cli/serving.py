"""A server in the foreground, from the address it listens on to its clean end."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import ssl
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp
from transformers import PreTrainedTokenizerBase

from qserve.cli.model import console, load_engine, servable
from qserve.cli.options import API_KEY_VARIABLE
from qserve.config import ConfigError, EngineConfig, ServerConfig
from qserve.engine.loading import resolve_device
from qserve.models.source import open_source
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine
from qserve.server.engine_process import EngineProcess
from qserve.server.middleware import request_logger
from qserve.server.shared_engine import SharedEngine

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

LAST_SECONDS = 30
"""How long clients may take, once all answers are there, to read them or to send half a request."""


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line, and the one in the environment."""
    lines = path.read_text().split() if path else []
    given = os.environ.get(API_KEY_VARIABLE)
    if path and not lines:
        raise ConfigError(f"{path} holds no API key")
    return (*lines, given) if given else tuple(lines)


def check_tls(config: ServerConfig) -> None:
    """Raise ConfigError unless the certificate and the key, if any, can be used together."""
    if config.tls_certificate is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except ssl.SSLError as error:
        message = f"{config.tls_certificate} and {config.tls_key} are no certificate with its key"
        raise ConfigError(f"{message}: {error.reason}") from error


def tracer_from_environment() -> Tracer | None:
    """What sends traces where OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) says; else None.

    Raises ConfigError if what is asked for cannot be had.
    """
    if not (_setting("ENDPOINT") and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp"):
        return None
    if _setting("PROTOCOL") not in (None, "http/protobuf"):
        raise ConfigError(f"traces are sent by http/protobuf, not by {_setting('PROTOCOL')}")
    try:
        from qserve.server.tracing import otlp_tracer
    except ImportError as error:
        raise ConfigError(f"traces need pip install 'qserve[tracing]': {error}") from error
    return otlp_tracer()


def _setting(name: str) -> str | None:
    """A standard variable of OpenTelemetry's exporter: the one for traces, else that for all."""
    common = os.environ.get(f"OTEL_EXPORTER_OTLP_{name}")
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", common) or None


def bound_socket(config: ServerConfig) -> socket.socket:
    """Take the address before any work; connections are refused until the server is ready.

    Raises ValueError if the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        message = f"cannot listen on {config.host} port {config.port}: {error.strerror}"
        raise ValueError(message) from error
    return listener


def open_engine(
    model: str,
    precision: str | None,
    config: EngineConfig,
    replicas: int | None,
    max_requests: int,
) -> tuple[SharedEngine, PreTrainedTokenizerBase]:
    """The model, ready, and its tokenizer: in `replicas` of Ray Serve, or one engine.

    That one is on a thread of this process where the model runs on a CPU, which has nothing to do
    beside it; for a GPU it is a process, since the server's Python would keep the GPU waiting.
    """
    if replicas is not None:
        return _start_replicas(model, precision, config, replicas, max_requests)
    if resolve_device(config.device).type != "cpu":
        process = EngineProcess(partial(load_engine, model, precision, config), max_requests)
        return process, process.tokenizer
    engine = load_engine(model, precision, config)
    return AsyncEngine(engine, max_requests), engine.tokenizer


def _start_replicas(
    model: str, precision: str | None, config: EngineConfig, replicas: int, max_requests: int
) -> tuple[SharedEngine, PreTrainedTokenizerBase]:
    try:
        from qserve.server.replicas import ReplicatedEngine, start_replicas
    except ImportError as error:
        raise ConfigError(f"--replicas needs pip install 'qserve[replicas]': {error}") from error
    served = servable(model, precision)
    tokenizer = open_source(served).tokenizer()
    handle = start_replicas(partial(load_engine, served, precision, config), replicas)
    return ReplicatedEngine(handle, max_requests), tokenizer


def run_server(
    engine: SharedEngine,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    listener: socket.socket,
    config: ServerConfig,
    tracer: Tracer | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; admitted requests may then finish, unless a second follows."""
    if config.log_requests:
        _log_requests_to_stdout()
    application: ASGIApp = create_app(engine, tokenizer, name, config)
    if tracer is not None:
        from qserve.server.tracing import Tracing

        application = Tracing(application, tracer, name)
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.tls_certificate is None else "https"
    console.print(f"serving {name} at {scheme}://{host}:{port}/v1", highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn catches these while it serves and raises them again when it has ended; one that
        # comes before it serves is not lost.
        signal.signal(number, lambda *_: engine.drain())
    options = uvicorn.Config(
        application,
        log_level="warning",
        timeout_graceful_shutdown=LAST_SECONDS,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )
    gc.collect()
    gc.freeze()  # what is loaded stays; walking it in every full collection would stall all requests
    _DrainingServer(options, engine).run(sockets=[listener])


def _log_requests_to_stdout() -> None:
    request_logger.setLevel(logging.INFO)
    request_logger.addHandler(logging.StreamHandler(sys.stdout))
    request_logger.propagate = False


class _DrainingServer(uvicorn.Server):
    """Goes on listening after the first signal, to say that it is shutting down, until it is idle."""

    def __init__(self, config: uvicorn.Config, engine: SharedEngine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._engine.is_draining:
            self.force_exit = self.should_exit = True
        self._engine.drain()

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self._engine.is_draining and self._engine.is_idle
        return await super().on_tick(counter)
