"""A web application on a thread of this process, or `qserve serve` in one of its own; at free ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import uvicorn
from starlette.types import ASGIApp


@contextmanager
def serve_in_thread(app: ASGIApp) -> Iterator[str]:
    """Serve while the context is open; gives the base URL. On exit, open requests may finish."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def serve_in_process(
    model: str, *options: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with `qserve serve`, and its base URL; on exit it must end well when told to."""
    command = [sys.executable, "-m", "qserve", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        url = _announced_url(process)
        _wait_until_listening(url)
        yield process, url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "the server did not end well"
    finally:
        process.kill()
        process.communicate()


def _wait_until_listening(url: str) -> None:
    """The address is announced when it is taken, which is before it listens."""
    host, port = url.split("/")[2].rsplit(":", 1)
    while True:
        with suppress(ConnectionRefusedError):
            socket.create_connection((host, int(port))).close()
            return
        time.sleep(0.02)


def _announced_url(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        if line.startswith("serving "):
            return line.split()[-1].removesuffix("/v1")
        seen.append(line)
    raise RuntimeError(f"qserve serve has ended: {''.join(seen)}")
