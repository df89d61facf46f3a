"""What the host does for each token, and what of an engine's pace clients get through HTTP.

The engine is the house's own, with a real tokenizer, over a device that only takes time: it makes so
many tokens per second at most. Server and clients are processes of one machine, so it takes as many
free CPU cores for a fair number; the CPU time of each thread depends on that less.

    python benchmarks/server_overhead.py TOKENIZER [--clients 512] [--tokens-per-second 25000]
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from qserve.engine.request import SamplingParams
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine
from qserve.server.engine_process import EngineProcess
from qserve.testing.http import serve_in_thread
from qserve.testing.paced_engine import PacedEngine

TEXT = Path(__file__).parent.parent / "docs" / "engine.md"
"""What the engine writes."""

PROMPT_TOKENS = 100
END = b"data: [DONE]\n\n"


def paced_engine(options: argparse.Namespace) -> PacedEngine:
    torch.set_num_threads(1)
    step_seconds = options.clients / options.tokens_per_second
    return PacedEngine(options.tokenizer, TEXT.read_text(), step_seconds, options.clients)


def prompt(client: int) -> list[int]:
    """Begins with the place in the text from which the answer comes."""
    return [7 * client] + [0] * (PROMPT_TOKENS - 1)


class Measured(NamedTuple):
    """Wall time, and the CPU time of the engine (its thread or process) and of the server."""

    seconds: float
    engine_cpu: float
    server_cpu: float

    def since(self, earlier: Measured) -> Measured:
        return Measured(*(now - then for now, then in zip(self, earlier, strict=True)))


def measure(engine: PacedEngine | None) -> Measured:
    """Now. engine: if it is of this process, else it is that of its child."""
    now, mine = time.perf_counter(), time.process_time()
    if engine is not None:
        return Measured(now, engine.thread_seconds, mine - engine.thread_seconds)
    (child,) = multiprocessing.active_children()
    counters = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = int(counters[11]) + int(counters[12])
    return Measured(now, ticks / os.sysconf("SC_CLK_TCK"), mine)


def measure_alone(options: argparse.Namespace) -> Measured:
    """The requests without a server."""
    engine = paced_engine(options)
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, temperature=0)
    gc.freeze()
    start = measure(engine)
    for client in range(options.clients):
        engine.add_request(str(client), prompt(client), params)
    while engine.has_unfinished:
        engine.step()
    return measure(engine).since(start)


def serve(pipe: Connection, options: argparse.Namespace) -> None:
    """The server's process: sends its address, then what it has measured whenever it is asked."""
    engine = paced_engine(options) if options.thread else None
    if engine is None:
        served = EngineProcess(partial(paced_engine, options), options.clients)
        app = create_app(served, served.tokenizer, "paced")
    else:
        app = create_app(AsyncEngine(engine, options.clients), engine.tokenizer, "paced")
    gc.freeze()
    with serve_in_thread(app) as url:
        pipe.send(int(url.rsplit(":", 1)[1]))
        while pipe.recv():
            pipe.send(measure(engine))


@dataclass
class Client:
    """One request over a bare socket."""

    connection: socket.socket
    received: list[bytes] = field(default_factory=list)

    def read(self) -> bool:
        """Take what there is; whether that was the end."""
        data = self.connection.recv(1 << 18)
        self.received.append(data)
        assert self.received[0].startswith(b"HTTP/1.1 200") and data, data
        return END in b"".join(self.received[-2:])

    @property
    def events(self) -> Iterator[dict[str, object]]:
        for line in b"".join(self.received).split(b"\n"):
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def ask(port: int, client: int, tokens: int, path: str) -> Client:
    body = {"max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    body |= {"prompt": prompt(client), "stream_options": {"include_usage": True}}
    sent = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + sent)
    return Client(connection)


def stream_all(port: int, clients: int, tokens: int) -> Sequence[Client]:
    """All clients at the same time, until each has the whole of its answer."""
    selector = selectors.DefaultSelector()
    asked = [ask(port, client, tokens, "/v1/completions") for client in range(clients)]
    for client in asked:
        selector.register(client.connection, selectors.EVENT_READ, client)
    while selector.get_map():
        for key, _ in selector.select():
            if key.data.read():
                selector.unregister(key.fileobj)
                key.data.connection.close()
    return asked


def check(clients: Sequence[Client], engine: PacedEngine, tokens: int) -> int:
    """That each got its text, token for token; the number of events that brought them."""
    num_events = 0
    for index, client in enumerate(clients):
        *parts, usage = client.events
        text = "".join(part["choices"][0]["text"] for part in parts)
        given = engine.tokens(prompt(index)[0], tokens)
        assert text == engine.tokenizer.decode(given), f"client {index} got another text"
        assert usage["usage"]["completion_tokens"] == tokens
        num_events += len(parts)
    return num_events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="a directory that holds one")
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--tokens-per-second", type=float, default=25_000)
    parser.add_argument("--thread", action="store_true", help="the engine in the server's process")
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(theirs, options))
    process.start()
    port = ours.recv()
    stream_all(port, options.clients, 10)
    ours.send(True)
    start, start_cpu = ours.recv(), time.process_time()
    clients = stream_all(port, options.clients, options.tokens)
    ours.send(True)
    clients_cpu, served = time.process_time() - start_cpu, ours.recv().since(start)
    ours.send(False)
    process.join()
    alone = measure_alone(options)
    total = options.clients * options.tokens
    events = check(clients, paced_engine(options), options.tokens)
    for name, m in (("engine alone", alone), ("through HTTP", served)):
        print(
            f"{name:14} {total / m.seconds:8,.0f} tokens/s; CPU time per token: engine "
            f"{1e6 * m.engine_cpu / total:5.1f} us, server {1e6 * m.server_cpu / total:5.1f} us"
        )
    print(f"clients: {1e6 * clients_cpu / total:.1f} us; {total / events:.2f} tokens an event")


if __name__ == "__main__":
    main()
