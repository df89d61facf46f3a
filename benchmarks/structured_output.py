"""How many sampled texts are JSON of their schema: a real model at temperature 1, over HTTP.

    python benchmarks/structured_output.py MODEL

MODEL is what `qserve serve` takes. Each schema bounds its strings, arrays and numbers, so
that a text can end within --max-tokens; one that is cut off counts as failed. Needs jsonschema.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.server.app import create_app
from qserve.server.async_engine import AsyncEngine
from qserve.testing.http import serve_in_thread

Schema = dict[str, Any]


def an_object(properties: dict[str, Schema], **more: Any) -> Schema:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, **more}


NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 24}
LENGTH: Schema = {"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.25}
CLOSED: Schema = {"additionalProperties": False}

CASES: dict[str, tuple[str, Schema]] = {
    "person": (
        "Describe a fictional person.",
        an_object(
            {
                "name": NAME,
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "email": {"type": "string", "pattern": "^[a-z]{1,10}@[a-z]{1,10}\\.(com|org)$"},
                "is_student": {"type": "boolean"},
            },
            **CLOSED,
        ),
    ),
    "recipe": (
        "Give me a short recipe.",
        an_object(
            {
                "title": NAME,
                "steps": {"type": "array", "items": NAME, "minItems": 1, "maxItems": 4},
                "difficulty": {"enum": ["easy", "medium", "hard"]},
            },
            **CLOSED,
        ),
    ),
    "tree": (
        "Invent a small family tree.",
        {
            "$ref": "#/$defs/person",
            "$defs": {
                "person": an_object(
                    {
                        "name": NAME,
                        "children": {
                            "type": "array",
                            "maxItems": 2,
                            "items": an_object(
                                {
                                    "name": NAME,
                                    "born": {"type": "integer", "minimum": 1, "maximum": 2026},
                                },
                                **CLOSED,
                            ),
                        },
                    },
                    **CLOSED,
                )
            },
        },
    ),
    "choice of shapes": (
        "Describe a circle or a rectangle.",
        {
            "anyOf": [
                an_object({"circle": an_object({"radius": LENGTH}, **CLOSED)}, **CLOSED),
                an_object(
                    {
                        "rectangle": an_object(
                            {
                                "width": LENGTH,
                                "height": {"anyOf": [LENGTH, {"type": "null"}]},
                            },
                            **CLOSED,
                        )
                    },
                    **CLOSED,
                ),
            ]
        },
    ),
}


def body(case: str, seed: int, max_tokens: int) -> dict[str, Any]:
    prompt, schema = CASES[case]
    named = {"name": case.replace(" ", "_"), "schema": schema, "strict": True}
    return {
        "messages": [{"role": "user", "content": f"{prompt} Answer in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": named},
        "temperature": 1,
        "seed": seed,
        "max_tokens": max_tokens,
    }


def problem(choice: dict[str, Any], schema: Schema) -> str | None:
    """What is wrong with an answer, if anything."""
    text = choice["message"]["content"]
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{choice['finish_reason']}: {error}: {text!r}"
    return None if choice["finish_reason"] == "stop" else f"it ended by {choice['finish_reason']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=50, help="of each schema")
    parser.add_argument("--max-tokens", type=int, default=512)
    options = parser.parse_args()
    engine = Engine.load(options.model, EngineConfig(max_num_sequences=64))
    app = create_app(AsyncEngine(engine, 512), engine.tokenizer, "model")
    print("| schema | texts | valid | distinct | tokens, mean | seconds |")
    print("|---|---|---|---|---|---|")
    with serve_in_thread(app) as url, httpx.Client(base_url=url, timeout=600) as http:
        for case, (_, schema) in CASES.items():
            start = time.perf_counter()
            bodies = [body(case, seed, options.max_tokens) for seed in range(options.samples)]
            with ThreadPoolExecutor(64) as pool:
                post = lambda body: http.post("/v1/chat/completions", json=body).json()  # noqa: E731
                answers = list(pool.map(post, bodies))
            seconds = time.perf_counter() - start
            choices = [answer["choices"][0] for answer in answers]
            problems = [p for p in (problem(choice, schema) for choice in choices) if p]
            texts = {choice["message"]["content"] for choice in choices}
            tokens = sum(answer["usage"]["completion_tokens"] for answer in answers) / len(answers)
            print(
                f"| {case} | {len(choices)} | {len(choices) - len(problems)} | {len(texts)} "
                f"| {tokens:.0f} | {seconds:.0f} |",
                *problems[:3],
                sep="\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
