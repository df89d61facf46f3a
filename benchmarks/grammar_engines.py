"""Which library masks tokens for structured output: compile time and mask time of two of them.

    pip install xgrammar llguidance
    python benchmarks/grammar_engines.py path/to/tokenizer

Both walk the same texts. A mask time is that of one token of one sequence on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Schema = dict[str, Any]

PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.com$"},
    },
    "required": ["name", "age", "email"],
    "additionalProperties": False,
}
CASES: dict[str, tuple[Schema, Any]] = {
    "object": (PERSON, {"name": "Ada Lovelace", "age": 36, "email": "ada@engine.com"}),
    "array": (
        {"type": "array", "items": PERSON, "maxItems": 20},
        [{"name": f"Person {i}", "age": i, "email": "someone@there.com"} for i in range(10)],
    ),
    "choices": (
        {"enum": [f"category {index} of many" for index in range(500)]},
        "category 321 of many",
    ),
    "recursive": (
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "number"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["value", "children"],
                    "additionalProperties": False,
                }
            },
        },
        {"value": 1.5, "children": [{"value": 2, "children": []}, {"value": -3, "children": []}]},
    ),
    "any object": ({"type": "object"}, {"a": [1, 2, {"b": None}], "text": "one, two, three"}),
}


class Library(ABC):
    """Compiles a schema, then gives masks for the tokens of a text."""

    @abstractmethod
    def compile(self, schema: Schema) -> Any: ...

    @abstractmethod
    def mask(self, matcher: Any) -> None: ...

    @abstractmethod
    def accept(self, matcher: Any, token: int) -> bool: ...


class LLGuidance(Library):
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        import llguidance
        import llguidance.hf

        self._library = llguidance
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer)
        self._mask = numpy.empty((1, -(-len(tokenizer) // 32)), dtype=numpy.int32)

    def compile(self, schema: Schema) -> Any:
        matcher = self._library.LLMatcher
        return matcher(self._tokenizer, matcher.grammar_from_json_schema(schema))

    def mask(self, matcher: Any) -> None:
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))


class XGrammar(Library):
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        import xgrammar

        self._library = xgrammar
        information = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
        self._compiler = xgrammar.GrammarCompiler(information, max_threads=1, cache_enabled=False)
        self._mask = xgrammar.allocate_token_bitmask(1, information.vocab_size)

    def compile(self, schema: Schema) -> Any:
        grammar = self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        return self._library.GrammarMatcher(grammar)

    def mask(self, matcher: Any) -> None:
        matcher.fill_next_token_bitmask(self._mask)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))


def measure(library: Library, schema: Schema, tokens: Sequence[int]) -> tuple[float, list[float]]:
    """Milliseconds to compile, and microseconds for the mask before each token."""
    start = time.perf_counter()
    matcher = library.compile(schema)
    compiling = (time.perf_counter() - start) * 1e3
    masking = []
    for token in tokens:
        start = time.perf_counter()
        library.mask(matcher)
        masking.append((time.perf_counter() - start) * 1e6)
        if not library.accept(matcher, token):
            raise RuntimeError(f"{type(library).__name__} refuses token {token}")
    return compiling, masking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(parser.parse_args().tokenizer)
    print("| schema | library | tokens | compile ms | mask us, median | worst |")
    print("|---|---|---|---|---|---|")
    libraries = (XGrammar(tokenizer), LLGuidance(tokenizer))
    for name, (schema, value) in CASES.items():
        tokens = tokenizer.encode(json.dumps(value), add_special_tokens=False)
        for library in libraries:
            compiling, times = measure(library, schema, tokens)
            print(
                f"| {name} | {type(library).__name__} | {len(tokens)} | {compiling:.1f} "
                f"| {statistics.median(times):.0f} | {max(times):.0f} |"
            )


if __name__ == "__main__":
    main()
