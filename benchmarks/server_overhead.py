"""What streaming over HTTP costs: an engine's own tokens per second beside those that clients get.

The engine is a stub that emits a fixed number of tokens per second; server and clients are two
processes on one machine, so two free CPU cores are needed for a fair number.

    python benchmarks/server_overhead.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection

from qserve.engine.request import SamplingParams
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine
from qserve.testing.http import serve_in_thread
from qserve.testing.stub_engine import StubEngine
from qserve.testing.tiny import tiny_tokenizer

MARK = b'"index":'
"""Once in each token's event."""

PROMPT = "The quick brown fox jumps over the lazy dog. "


def stub(requests: int, tokens_per_second: float) -> StubEngine:
    return StubEngine(tiny_tokenizer(), requests / tokens_per_second, max_running=requests)


def engine_seconds(requests: int, tokens: int, tokens_per_second: float) -> float:
    """Wall time of the requests without a server."""
    engine = stub(requests, tokens_per_second)
    params = SamplingParams(max_tokens=tokens)
    start = time.perf_counter()
    for index in range(requests):
        engine.add_request(str(index), engine.tokenizer.encode(PROMPT), params)
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - start


def serve(pipe: Connection, requests: int, tokens_per_second: float) -> None:
    """The server's process: sends its address, ends when it is sent anything."""
    engine = stub(requests, tokens_per_second)
    app = create_app(AsyncEngine(engine, 2 * requests), engine.tokenizer, "stub")
    with serve_in_thread(app) as url:
        pipe.send(url.rsplit(":", 1)[1])
        pipe.recv()


async def stream(port: int, tokens: int) -> int:
    """One request over a bare socket; the number of tokens that came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    events, data = 0, b""
    while b"[DONE]" not in data:
        data = data[1 - len(MARK) :] + await reader.read(1 << 16)
        assert not reader.at_eof(), "the server has hung up"
        events += data.count(MARK)
    writer.close()
    return events


async def served_seconds(port: int, requests: int, tokens: int) -> float:
    start = time.perf_counter()
    counts = await asyncio.gather(*(stream(port, tokens) for _ in range(requests)))
    assert sum(counts) == requests * tokens, f"{sum(counts)} events for {requests * tokens} tokens"
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--tokens-per-second", type=float, default=10_000)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, options.requests, options.tokens_per_second)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
    process.start()
    port = int(ours.recv())
    asyncio.run(served_seconds(port, options.requests, 10))
    served = asyncio.run(served_seconds(port, options.requests, options.tokens))
    ours.send("end")
    process.join()
    alone = engine_seconds(options.requests, options.tokens, options.tokens_per_second)
    total = options.requests * options.tokens
    print(f"engine alone   {total / alone:9,.0f} tokens/s")
    print(
        f"through HTTP   {total / served:9,.0f} tokens/s, {100 * (served / alone - 1):.1f} % slower"
    )


if __name__ == "__main__":
    main()
