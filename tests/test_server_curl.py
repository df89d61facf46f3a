"""The server as `curl` sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from server_helpers import HELLO, serving, stub_engine

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with serving(stub_engine(), api_keys=("secret",)) as client:
        yield client


def curl(http: httpx.Client, path: str, *options: str) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "20", *options]
    url = str(http.base_url.join(path))
    key = ("--header", "Authorization: Bearer secret")
    return subprocess.run([*command, *key, url], capture_output=True, text=True, check=True).stdout


def test_whole_and_streamed(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 6}
    whole = json.loads(curl(http, "/v1/chat/completions", "--json", json.dumps(body)))
    body["stream"] = True
    streamed = curl(http, "/v1/chat/completions", "--no-buffer", "--json", json.dumps(body))
    *events, done = streamed.strip().split("\n\n")
    deltas = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events]
    assert done == "data: [DONE]"
    assert "".join(d["content"] or "" for d in deltas) == whole["choices"][0]["message"]["content"]


def test_statuses(http: httpx.Client) -> None:
    code = ("--output", "/dev/null", "--write-out", "%{http_code}")
    assert curl(http, "/v1/models", *code) == "200"
    assert curl(http, "/v1/completions", *code, "--json", '{"prompt": 5}') == "400"
    assert curl(http, "/v1/completions", *code, "--data", "prompt=x") == "400"
    assert curl(http, "/v1/nothing", *code) == "404"
    assert curl(http, "/health", *code, "--head") == "405"
