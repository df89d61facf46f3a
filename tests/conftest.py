"""Shared fixtures: seeds, the `gpu` mark that skips where there is no device, and a server.

What a server needs is imported when a test asks for one: GPU tests run without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    import httpx
    import openai


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output starts as what no kernel writes, so that one that is never written shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else -128)

        return allocate_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """A client of a server whose engine repeats prompts."""
    from server_helpers import serving, stub_engine

    with serving(stub_engine()) as http:
        yield http


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> openai.OpenAI:
    """OpenAI's own client of the same server."""
    from server_helpers import openai_client

    return openai_client(http)
