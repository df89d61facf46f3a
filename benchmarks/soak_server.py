"""Many streaming clients for minutes: errors, leaks, and whether seeded answers stay the same.

Starts `qserve serve MODEL` on this machine, asks a few seeded requests one after the other, then has
clients stream the same requests over and over at the same time. Memory, file descriptors and threads
of the server are read from /proc, once the clients are all under way and again when all have gone.

    python benchmarks/soak_server.py MODEL --clients 200 --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from qserve.testing.http import serve_in_process

QUESTIONS = [f"Tell me something about the number {number}." for number in range(16)]


@dataclass
class Soak:
    """What the clients see. tokens: of an answer at most. expected: each question's answer, alone."""

    http: httpx.AsyncClient
    tokens: int
    expected: dict[str, str] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)

    async def ask_alone(self) -> None:
        """Take note of what each question's answer is to be."""
        self.expected = {question: await self.answer(question) for question in QUESTIONS}

    async def answer(self, question: str) -> str:
        """The whole text of a streamed answer; an exception if anything is amiss."""
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.tokens,
            "seed": QUESTIONS.index(question),
            "stream": True,
        }
        parts: list[str] = []
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return "".join(parts)
                if line:
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    parts.append(choice["delta"]["content"] or "")
        raise ConnectionError("the stream ended before its end was announced")

    async def client(self, number: int, until: float) -> None:
        """Ask one question after the other."""
        while time.monotonic() < until:
            await self.ask(number)
            number += 1

    async def ask(self, number: int) -> None:
        """Ask a question; count how it was answered."""
        question = QUESTIONS[number % len(QUESTIONS)]
        try:
            same = await self.answer(question) == self.expected[question]
            self.outcomes["as expected" if same else "different"] += 1
        except Exception as error:
            self.outcomes[f"error: {error!r}"] += 1


@dataclass(frozen=True)
class Usage:
    """Of the server's process. resident: MiB. pages: of the KV cache, in use."""

    resident: float
    files: int
    threads: int
    pages: int

    def __str__(self) -> str:
        return (
            f"{self.resident:.1f} MiB resident, {self.files} file descriptors, "
            f"{self.threads} threads, {self.pages} pages in use"
        )


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The engine's metrics by name."""
    text = (await http.get("/metrics")).text
    found = re.findall(r"^([\w:]+)\{model_name=[^,}]*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def usage(pid: int, http: httpx.AsyncClient) -> Usage:
    process = Path(f"/proc/{pid}")
    status = dict(re.findall(r"^(\w+):\s*(\d+)", (process / "status").read_text(), re.MULTILINE))
    files = len(list((process / "fd").iterdir()))
    found = await metrics(http)
    pages = round(found["vllm:kv_cache_usage_perc"] * found["qserve:kv_cache_pages"])
    return Usage(int(status["VmRSS"]) / 1024, files, int(status["Threads"]), pages)


async def soak(pid: int, url: str, clients: int, seconds: float, tokens: int) -> bool:
    """Print what happened; whether all is as it should be."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http,
        httpx.AsyncClient(base_url=url, timeout=None) as observer,
    ):
        run = Soak(http, tokens)
        await run.ask_alone()
        before = await usage(pid, observer)
        start = time.monotonic()
        tasks = [asyncio.create_task(run.client(n, start + seconds)) for n in range(clients)]
        await asyncio.sleep(seconds / 5)
        early = await usage(pid, observer)
        await asyncio.sleep(start + seconds - time.monotonic())
        late = await usage(pid, observer)
        await asyncio.gather(*tasks)
    async with httpx.AsyncClient(base_url=url) as observer:
        await asyncio.sleep(1)
        after = await usage(pid, observer)
    took = time.monotonic() - start
    print(f"{clients} clients for {took:.0f} s, {sum(run.outcomes.values())} answers", end="")
    print(f" of at most {tokens} tokens: {dict(run.outcomes)}")
    for name, state in (
        ("before", before),
        ("after a fifth", early),
        ("at the end", late),
        ("when idle", after),
    ):
        print(f"{name:14} {state}")
    growth = late.resident / early.resident - 1
    print(f"memory grew by {100 * growth:.1f} % from a fifth of the time to its end")
    is_clean = after.pages == 0 and after.files <= before.files and growth < 0.05
    return is_clean and set(run.outcomes) == {"as expected"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tokens", type=int, default=16)
    options, others = parser.parse_known_args()
    with serve_in_process(options.model, *others) as (process, url):
        passed = asyncio.run(
            soak(process.pid, url, options.clients, options.seconds, options.tokens)
        )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
