"""Every kind of bad client at once with good ones: what the bad get, and whether the good notice.

Starts `qserve serve MODEL` on this machine. Good clients stream seeded requests all the time, whose
answers must be those that were given before; beside them, one kind of trouble after the other. Last,
the server is told to end while many clients stream.

    python benchmarks/chaos.py MODEL
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import httpx
from soak_server import Soak, metrics, usage

from qserve.testing.http import serve_in_process

COMPLETIONS = "/v1/completions"
GOOD_CLIENTS = 4
AT_ONCE = 20
STREAMS = 50
LONG = {"prompt": "Once upon a time", "ignore_eos": True, "stream": True}


@dataclass(frozen=True)
class Server:
    """Where it listens."""

    host: str
    port: int

    @asynccontextmanager
    async def connection(
        self, receive_buffer: int | None = None
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        end = socket.create_connection((self.host, self.port))
        if receive_buffer is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        reader, writer = await asyncio.open_connection(sock=end, limit=receive_buffer or 2**16)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def request(content: bytes, length: int | None = None) -> bytes:
    """A completion's request; `length` is what is announced, if it is not the truth."""
    size = len(content) if length is None else length
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
    return head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + content


async def status(reader: asyncio.StreamReader) -> str:
    """The answer's status, and whether its body is an error in OpenAI's shape."""
    answer = await reader.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    code = head.split(b" ")[1].decode()
    return code if set(json.loads(body)["error"]) == _ERROR_FIELDS else f"{code} of another shape"


_ERROR_FIELDS = {"message", "type", "param", "code"}


# Kinds of trouble: each takes the server and gives what one such client got.


async def leaves_in_mid_stream(server: Server) -> str:
    async with server.connection() as (reader, writer):
        writer.write(request(json.dumps({**LONG, "max_tokens": 400}).encode()))
        await reader.read(1)
        await asyncio.sleep(random.uniform(0, 0.5))
    return "left"


async def leaves_before_the_answer(server: Server) -> str:
    async with server.connection() as (_, writer):
        writer.write(request(json.dumps({**LONG, "stream": False, "max_tokens": 400}).encode()))
        await asyncio.sleep(random.uniform(0, 0.5))
    return "left"


async def leaves_after_half_a_body(server: Server) -> str:
    async with server.connection() as (_, writer):
        writer.write(request(b'{"prompt": ', 100))
        await asyncio.sleep(random.uniform(0, 0.5))
    return "left"


async def waits_after_half_a_body(server: Server) -> str:
    async with server.connection() as (reader, writer):
        writer.write(request(b'{"prompt": ', 100))
        return await status(reader)


async def reads_slowly(server: Server) -> str:
    """As slowly as its small buffers let it: the server has to keep what is not read."""
    last = b""
    async with server.connection(receive_buffer=4096) as (reader, writer):
        writer.write(request(json.dumps({**LONG, "max_tokens": 100, "n": 4}).encode()))
        while part := await reader.read(2048):
            last = (last + part)[-100:]
            await asyncio.sleep(0.05)
    return "whole" if b"data: [DONE]" in last else "part"


def sends(content: bytes) -> Callable[[Server], Awaitable[str]]:
    """A client that sends this body and reads the answer."""

    async def send(server: Server) -> str:
        async with server.connection() as (reader, writer):
            writer.write(request(content))
            await writer.drain()
            return await status(reader)

    return send


def asks(**fields: object) -> Callable[[Server], Awaitable[str]]:
    return sends(json.dumps({"prompt": "x", **fields}).encode())


async def speaks_no_http(server: Server) -> str:
    async with server.connection() as (reader, writer):
        writer.write(random.Random(0).randbytes(1000) + b"\r\n\r\n")
        return (await reader.read()).split(b" ")[1].decode()


DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

CHAIN = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(5500)}
"""Definitions, each of which leads to the next: those who follow them by recursion need a deep stack."""

TROUBLES: Sequence[tuple[str, int, str, Callable[[Server], Awaitable[str]]]] = (
    ("leaves in mid-stream", 100, "left", leaves_in_mid_stream),
    ("leaves before the answer", 100, "left", leaves_before_the_answer),
    ("sends half a body and leaves", 100, "left", leaves_after_half_a_body),
    ("sends half a body and waits", 20, "408", waits_after_half_a_body),
    ("reads slowly, with small buffers", 20, "whole", reads_slowly),
    ("a prompt longer than the cache and the context", 50, "400", asks(prompt="x " * 20_000)),
    ("a prompt of 10 MB", 20, "413", asks(prompt="x" * 10**7)),
    ("bytes that are not UTF-8", 100, "400", sends(b'{"prompt": "\xff\xfe"}')),
    ("half of a surrogate pair", 100, "400", sends(b'{"prompt": "\\ud800"}')),
    ("JSON that is 100,000 deep", 50, "400", sends(DEEP)),
    (
        "a schema of 5,500 references in a chain",
        20,
        "400",
        asks(
            structured_outputs={
                "json": {"$defs": {**CHAIN, "5500": {"not": {}}}, "$ref": "#/$defs/0"}
            }
        ),
    ),
    ("100,000 stop strings", 50, "400", asks(stop=[f"stop {i}" for i in range(100_000)])),
    ("n = 10**9", 100, "400", asks(n=10**9)),
    ("logprobs = 10**9", 100, "400", asks(logprobs=10**9)),
    ("max_tokens = -1", 100, "400", asks(max_tokens=-1)),
    ("10,000 prompts", 50, "400", asks(prompt=["x"] * 10_000)),
    ("no HTTP", 100, "400", speaks_no_http),
)


# The run.


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def shown(got: Counter[str]) -> str:
    return ", ".join(f"{answer}: {count}" for answer, count in got.items())


async def cause(
    server: Server, count: int, trouble: Callable[[Server], Awaitable[str]]
) -> Counter[str]:
    """What `count` clients got, some of them at a time."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one() -> str:
        async with turns:
            return await trouble(server)

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


async def good_answers(good: Soak, more: int) -> None:
    """Wait until the good clients have got so many more answers."""
    wanted = good.outcomes.total() + more
    while good.outcomes.total() < wanted:
        await asyncio.sleep(0.05)


def disturbed(answers: Counter[str]) -> int:
    return answers.total() - answers["as expected"]


async def all_troubles(server: Server, good: Soak) -> bool:
    """A row of the table for each kind; whether all was as it should be."""
    end = time.monotonic() + 3600
    tasks = [asyncio.create_task(good.client(number, end)) for number in range(GOOD_CLIENTS)]
    passed = True
    for name, count, expected, trouble in TROUBLES:
        before = Counter(good.outcomes)
        got = await cause(server, count, trouble)
        await good_answers(good, 2 * GOOD_CLIENTS)
        others = good.outcomes - before
        row(name, count, expected, shown(got), others.total(), disturbed(others))
        passed &= got == {expected: count} and disturbed(others) == 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return passed


async def wait_for_metric(http: httpx.AsyncClient, name: str, value: float) -> None:
    while (await metrics(http))[name] != value:
        await asyncio.sleep(0.02)


async def told_to_end(process: subprocess.Popen[str], server: Server, good: Soak) -> bool:
    """SIGTERM while many stream: they get the whole, those who come later 503."""
    streams = [asyncio.create_task(good.ask(number)) for number in range(STREAMS)]
    while (await metrics(good.http))["vllm:num_requests_running"] + good.outcomes.total() < STREAMS:
        await asyncio.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    while (await good.http.get("/ready")).status_code != 503:
        await asyncio.sleep(0.01)
    refused = await cause(server, STREAMS, asks())
    await asyncio.gather(*streams)
    ended = await asyncio.to_thread(process.wait, 60)
    others = good.outcomes
    row(
        "SIGTERM under load, then",
        STREAMS,
        "503",
        shown(refused),
        others.total(),
        disturbed(others),
    )
    print(f"\nThe server's exit code after SIGTERM: {ended}")
    return refused == {"503": STREAMS} and disturbed(others) == 0 and ended == 0


async def chaos(process: subprocess.Popen[str], url: str) -> bool:
    server = Server("127.0.0.1", httpx.URL(url).port or 80)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits()) as http:
        good, streams = Soak(http, tokens=16), Soak(http, tokens=100)
        await good.ask_alone()
        await streams.ask_alone()
        before = await usage(process.pid, http)
        row("trouble", "clients", "each expects", "they got", "others' answers", "disturbed")
        row("---", "---:", "---", "---", "---:", "---:")
        passed = await all_troubles(server, good)
        await wait_for_metric(http, "vllm:kv_cache_usage_perc", 0)
        after = await usage(process.pid, http)
        passed &= await told_to_end(process, server, streams)
    print(f"Before all trouble: {before}\nAfter it: {after}")
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    options, others = parser.parse_known_args()
    with serve_in_process(options.model, *others) as (process, url):
        passed = asyncio.run(chaos(process, url))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
