"""`make demo`: quantize a small real model, serve it, and ask it two questions at once."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from openai import AsyncOpenAI
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor

from qserve.formats.kv import KVFormat
from qserve.models.config import ModelConfig
from qserve.models.names import EMBEDDING, LM_HEAD, tensor_shapes
from qserve.models.source import SMOLLM2_ALIAS, open_source

CHECKPOINT = Path("demo-model")
QUESTIONS = ("What is gravity?", "Why is the sky blue?")
MAX_TOKENS = 96
START_SECONDS, STOP_SECONDS = 180, 30

console = Console()


@dataclass(frozen=True)
class Reply:
    question: str
    text: str
    tokens: int


def main() -> None:
    """The whole demo; raises, and so exits with an error, if any part of it fails."""
    prepare_checkpoint()
    with running_server() as url:
        start = time.perf_counter()
        replies = asyncio.run(ask_both(url))
        seconds = time.perf_counter() - start
    show(replies, seconds)


def prepare_checkpoint() -> None:
    if CHECKPOINT.is_dir():
        console.print(f"Using the checkpoint in ./{CHECKPOINT} (delete it to quantize again).")
        return
    console.print(f"Quantizing {SMOLLM2_ALIAS} to W4A8KV4 in ./{CHECKPOINT}")
    qserve = (sys.executable, "-m", "qserve")
    subprocess.run([*qserve, "quantize", SMOLLM2_ALIAS, "-o", str(CHECKPOINT)], check=True)


@contextmanager
def running_server() -> Iterator[str]:
    """A server in a process of its own; it must be up in time and end cleanly when asked to."""
    port = free_port()
    command = [sys.executable, "-m", "qserve", "serve", str(CHECKPOINT), "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process)
        yield f"{url}/v1"
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_SECONDS)
        if status != 0:
            raise RuntimeError(f"the server ended with exit code {status}")
    finally:
        process.kill()
        process.wait()
    console.print("The server has stopped cleanly.")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended at once, with exit code {process.returncode}")
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"the server was not ready within {START_SECONDS} s")


async def ask_both(url: str) -> tuple[Reply, Reply]:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        return await asyncio.gather(
            ask_streaming(client, QUESTIONS[0]), ask_whole(client, QUESTIONS[1])
        )


async def ask_streaming(client: AsyncOpenAI, question: str) -> Reply:
    stream = await client.chat.completions.create(
        model=CHECKPOINT.name,
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, tokens = "", 0
    console.rule(f"{question} (as it streams)")
    async for chunk in stream:
        delta = "".join(choice.delta.content or "" for choice in chunk.choices)
        console.print(delta, end="", highlight=False, markup=False)
        text += delta
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    console.print()
    return checked(Reply(question, text, tokens))


async def ask_whole(client: AsyncOpenAI, question: str) -> Reply:
    answer = await client.chat.completions.create(
        model=CHECKPOINT.name,
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_TOKENS,
        temperature=0,
    )
    tokens = answer.usage.completion_tokens if answer.usage else 0
    return checked(Reply(question, answer.choices[0].message.content or "", tokens))


def checked(reply: Reply) -> Reply:
    if not reply.text.strip() or not reply.tokens:
        raise RuntimeError(f"there was no answer to {reply.question!r}")
    return reply


def show(replies: tuple[Reply, Reply], seconds: float) -> None:
    console.rule(f"{replies[1].question} (in one piece)")
    console.print(replies[1].text, highlight=False, markup=False)
    console.rule()
    tokens = sum(reply.tokens for reply in replies)
    console.print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s for both\n")
    console.print(size_table())


def size_table() -> Table:
    """Bytes of the checkpoint's tensors and of the cache, beside those of the model in 16 bits.

    A rotated model stores its head apart from its embedding, which the original may share.
    """
    original, quantized = open_source(SMOLLM2_ALIAS).config, open_source(str(CHECKPOINT))
    stored = {name: tensor_bytes(quantized.tensor(name)) for name in quantized.names()}
    fp16 = {name: 2 * math.prod(shape) for name, shape in tensor_shapes(original).items()}
    table = Table("", "W4A8KV4", "fp16", "smaller")
    add_row(table, "checkpoint", sum(stored.values()), sum(fp16.values()))
    ends = (sum(sizes.get(name, 0) for name in (EMBEDDING, LM_HEAD)) for sizes in (stored, fp16))
    add_row(table, "  of it, embedding and head, 16 bits", *ends)
    add_row(table, "KV cache of one token", *(kv_bytes(original, bits) for bits in (4, 16)))
    return table


def add_row(table: Table, name: str, ours: int, theirs: int) -> None:
    table.add_row(name, decimal(ours), decimal(theirs), f"{theirs / ours:.2f}x")


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def kv_bytes(config: ModelConfig, bits: int) -> int:
    """Of one token in all layers."""
    kv_format = KVFormat(bits, config.head_dim, config.num_kv_heads)
    return config.num_layers * kv_format.bytes_per_token


if __name__ == "__main__":
    main()
