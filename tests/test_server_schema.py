"""The API's own description, taken at its word: requests drawn from it, and answers held to it.

A longer run: `schemathesis run http://HOST:8000/openapi.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from server_helpers import serving

from qserve.engine.llm import LLM
from qserve.testing.tiny import save_tiny_model, tiny_config

pytest.importorskip("schemathesis")

import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
OPERATIONS = {
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "GET /v1/models",
    "POST /tokenize",
    "POST /detokenize",
    "GET /health",
    "GET /ready",
    "GET /metrics",
    "GET /",
}


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx.Client]:
    model = save_tiny_model(tmp_path, tiny_config(max_position_embeddings=64))
    with serving(LLM(model, max_num_sequences=8).engine) as client:
        yield client


def test_every_request_gets_an_answer_as_described(http: httpx.Client) -> None:
    schema = schemathesis.openapi.from_url(str(http.base_url.join("/openapi.json")))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.label for operation in operations} >= OPERATIONS
    for operation in operations:
        _try(operation)


def _try(operation: schemathesis.APIOperation) -> None:
    """Requests that keep to the description, and, where there is a body to spoil, that do not."""
    modes = list(schemathesis.GenerationMode)
    for mode in modes if operation.method == "post" else modes[:1]:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        check()
