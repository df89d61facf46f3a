"""The engine: requests in, tokens and text out, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qserve.config import EngineConfig
from qserve.engine.request import RequestOutput, SamplingParams


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics. Counters run from the engine's start; `*_tokens` count tokens."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int


class Engine:
    """Serves requests on one decoder with a paged cache. Not thread-safe: one thread owns it."""

    def __init__(self, decoder: Any, tokenizer: Any, config: EngineConfig) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path, config: EngineConfig) -> Engine:
        """Open a checkpoint directory, hub id or GGUF file and make it ready to serve."""
        raise NotImplementedError

    def add_request(
        self, request_id: str, prompt_token_ids: TokenIds[int], params: SamplingParams
    ) -> None:
        """Queue a request.

        Raises RequestError, before anything changes, if it could never be served.
        """
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """Forget a request and free its pages; no further output comes for it.

        Unknown ids are ignored.
        """
        raise NotImplementedError

    def step(self) -> list[RequestOutput]:
        """Advance every running sequence by one step; return what each request gained."""
        raise NotImplementedError

    @property
    def has_unfinished(self) -> bool:
        raise NotImplementedError

    @property
    def stats(self) -> EngineStats:
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for."""
        raise NotImplementedError
