"""A server in the foreground, from the address it listens on to its clean end."""

from __future__ import annotations

import signal
import socket

import uvicorn

from qserve.cli.model import console
from qserve.config import ServerConfig
from qserve.engine.engine import Engine
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine


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


def run_server(engine: Engine, name: str, listener: socket.socket, config: ServerConfig) -> None:
    """Serve until SIGINT or SIGTERM; requests under way may finish."""
    application = create_app(AsyncEngine(engine, config.max_requests), engine.tokenizer, name)
    host, port = listener.getsockname()[:2]
    console.print(f"serving {name} at http://{host}:{port}/v1", highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn catches these while it serves and raises them again when it has ended.
        signal.signal(number, lambda *_: None)
    uvicorn.Server(uvicorn.Config(application, log_level="warning")).run(sockets=[listener])
