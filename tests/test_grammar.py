"""Grammar-guided generation by the engine: the text is what the grammar says, whatever the rest."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.benchmark.dummy import NoText
from qserve.config import EngineConfig
from qserve.engine.device import DevicePolicy
from qserve.engine.engine import Engine
from qserve.engine.grammar import MAX_GRAMMAR_LENGTH, GrammarCompiler
from qserve.engine.llm import Completion, Generation
from qserve.engine.loading import load_model
from qserve.engine.request import FinishReason, Grammar, GrammarKind, RequestError, SamplingParams
from qserve.testing.tiny import tiny_source, tiny_tokenizer

EOS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def regex(pattern: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, pattern)


def lark(text: str) -> Grammar:
    return Grammar(GrammarKind.LARK, text)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), 320, [EOS])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.from_source(tiny_source(), EngineConfig(max_num_sequences=8))
    yield engine
    engine.check_integrity()


def generate(engine: Engine, prompts: dict[str, SamplingParams]) -> dict[str, list[Completion]]:
    """All of them together; the prompts are the keys."""
    generations = {
        prompt: Generation([], [Completion() for _ in range(params.n)])
        for prompt, params in prompts.items()
    }
    for prompt, params in prompts.items():
        engine.add_request(prompt, engine.tokenizer.encode(prompt), params)
    while engine.has_unfinished:
        for output in engine.step():
            generations[output.request_id].extend(output)
    return {prompt: generation.completions for prompt, generation in generations.items()}


def guided(engine: Engine, grammar: Grammar, **options: Any) -> list[Completion]:
    params = SamplingParams(**{"max_tokens": 400, "seed": 5, **options}, grammar=grammar)
    return generate(engine, {"hello": params})["hello"]


@pytest.mark.parametrize("temperature", [0, 1, 3])
def test_json_fulfils_its_schema(engine: Engine, temperature: float) -> None:
    for completion in guided(engine, Grammar.of_json(PERSON), n=6, temperature=temperature):
        assert completion.finish_reason is FinishReason.STOP and completion.stop_reason is None
        value = json.loads(completion.text)
        assert set(value) == {"name", "age", "tags"} and len(value["name"]) <= 8
        assert 0 <= value["age"] <= 150 and set(value["tags"]) <= {"a", "b"}


@pytest.mark.parametrize(
    "grammar",
    [
        regex(r"[a-f]{3,5}-[0-9]{2}"),
        lark('start: "ab" /[c-f]{1,3}/ "-" NUMBER\nNUMBER: /[0-9]{2}/'),
    ],
)
def test_text_matches(engine: Engine, grammar: Grammar) -> None:
    texts = [completion.text for completion in guided(engine, grammar, n=8, temperature=2)]
    assert [text for text in texts if not re.fullmatch(r"[a-f]{3,5}-[0-9]{2}", text)] == []
    assert len(set(texts)) > 4


@pytest.mark.parametrize("choices", [["yes", "no"], ['a"b', "x\ny", "é😀", "\\d/", "a", "aa"]])
def test_choices(engine: Engine, choices: list[str]) -> None:
    completions = guided(engine, Grammar.of_choices(choices), n=24, temperature=5, top_k=50)
    texts = {completion.text for completion in completions}
    assert texts <= set(choices) and len(texts) > 1


def test_filters_and_biases_act_within_the_grammar(engine: Engine) -> None:
    """Even where they favour what is barred, or bar nothing but what is allowed."""
    for options in (
        {"logit_bias": dict.fromkeys((EOS, 74), 100.0)},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1},
        {"logit_bias": dict.fromkeys(range(320), -100.0)},
        {"repetition_penalty": 2.0, "frequency_penalty": 1.0},
    ):
        (completion,) = guided(engine, regex("[x-z]{20}"), **options)
        assert re.fullmatch("[x-z]{20}", completion.text)


def test_a_seeded_text_is_the_same_in_any_company(engine: Engine) -> None:
    alone = {
        prompt: generate(engine, {prompt: params})[prompt] for prompt, params in company().items()
    }
    assert generate(engine, company()) == alone


def company() -> dict[str, SamplingParams]:
    options: dict[str, Any] = {"max_tokens": 60, "seed": 3}
    return {
        "json ": SamplingParams(**options, grammar=Grammar.of_json(PERSON), n=2, logprobs=2),
        "free ": SamplingParams(**options, n=2),
        "regex": SamplingParams(**options, grammar=regex("(ab|c){1,30}")),
        "other": SamplingParams(**options, grammar=regex("[0-9]+"), temperature=0),
    }


def test_nothing_changes_where_steps_overlap(engine: Engine) -> None:
    """The guided do not run ahead; the others do, and finish first."""
    loaded = load_model(tiny_source(), EngineConfig())
    ahead = Engine(loaded.decoder, loaded.tokenizer, EngineConfig(), policy=DevicePolicy(1, 8, 64))
    assert generate(ahead, company()) == generate(engine, company())
    ahead.check_integrity()


def test_preemption_does_not_lose_the_place(engine: Engine) -> None:
    small = Engine.from_source(tiny_source(), EngineConfig(max_num_sequences=8, num_pages=5))
    grammar = regex("([a-e]{7}, ){12}")
    prompts = {
        f"{index} {'x' * 50}": SamplingParams(seed=index, grammar=grammar) for index in range(4)
    }
    assert generate(small, prompts) == generate(engine, prompts)
    assert small.stats.preemptions > 0


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """The only token allowed is certain for the grammar, not for the model."""
    (completion,) = guided(engine, regex("q"), logprobs=1)
    first, end = completion.logprobs or []
    assert completion.text == "q" and first.logprob < -1 and end.token_id == EOS


def test_ends_only_where_the_text_is_complete(compiler: GrammarCompiler) -> None:
    """A stop token counts as an end: even where the grammar has a use for it as a letter."""
    a, b = tiny_tokenizer().encode("ab")
    guide = compiler.guide(regex("aab?"), [EOS, b])
    assert allowed(guide.mask()) == {a}
    assert guide.accept(a) and allowed(guide.mask()) == {a}
    assert guide.accept(a) and allowed(guide.mask()) == {EOS, b}


def test_a_tokenizer_that_cannot_be_guided_is_named() -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        GrammarCompiler(NoText(), 320, [EOS]).check(regex("a"))  # type: ignore[arg-type]


def chain_of_rules(length: int) -> Grammar:
    rules = [f"r{index}: r{index + 1}" for index in range(length)]
    return lark("\n".join(["start: r0", *rules, f'r{length}: "x"']))


def chain_of_schemas(length: int) -> Grammar:
    definitions: dict[str, Any] = {
        f"{index}": {"$ref": f"#/$defs/{index + 1}"} for index in range(length)
    }
    definitions[f"{length}"] = {"const": "x"}
    return Grammar.of_json({"$defs": definitions, "$ref": "#/$defs/0"})


@pytest.mark.parametrize("grammar", [chain_of_rules(16000), chain_of_schemas(7000)], ids=["", "$"])
def test_a_chain_of_references_overflows_no_stack(
    compiler: GrammarCompiler, grammar: Grammar
) -> None:
    """It would end the process; on a thread's usual stack it takes some 3,000 to do so."""
    assert len(grammar.text) > 0.8 * MAX_GRAMMAR_LENGTH
    guide = compiler.guide(grammar, [EOS])
    assert EOS not in allowed(guide.mask()) and guide.accept(min(allowed(guide.mask())))


def allowed(mask: numpy.ndarray[Any, Any]) -> set[int]:
    return set(numpy.flatnonzero(numpy.unpackbits(mask, bitorder="little")).tolist())


def words_up_to(length: int, letters: str) -> list[str]:
    layers = [[""]]
    for _ in range(length):
        layers.append([word + letter for word in layers[-1] for letter in letters])
    return [word for layer in layers for word in layer]


WORDS = [*words_up_to(6, "abcd"), *words_up_to(4, "wxyz")]


@settings(deadline=None, max_examples=40)
@given(data=st.data(), pattern=st.sampled_from(["(a|bc)*d", "[ab]{2,4}c?", "x(y|z)+|w", "a?b?c?"]))
def test_masks_are_what_regular_expressions_say(
    compiler: GrammarCompiler, data: st.DataObject, pattern: str
) -> None:
    """The oracle: a token is allowed if some short word that begins so matches; Python knows."""
    guide = compiler.guide(regex(pattern), [EOS])
    words = [word for word in WORDS if re.fullmatch(pattern, word)]
    text = ""
    while len(text) < 3:
        expected = {word[len(text)] for word in words if word.startswith(text) and word != text}
        now = allowed(guide.mask())
        spelled = {tiny_tokenizer().decode([token]) for token in now - {EOS}}
        assert spelled == expected and (EOS in now) == (text in words)
        if not expected:
            return
        letter = data.draw(st.sampled_from(sorted(expected)))
        assert guide.accept(*tiny_tokenizer().encode(letter))
        text += letter


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (regex("a(b"), "unclosed group"),
        (regex("(?=a)b"), "look-ahead"),
        (regex("(" * 10**5 + ")" * 10**5), "regex"),
        (lark("start: missing"), "missing"),
        (lark("start: " + "(" * 10**5), "deeply nested"),
        (Grammar.of_json({"type": "strin"}), "strin"),
        (Grammar.of_json({"$ref": "#"}), "no text fulfils it"),
        (Grammar.of_json({"$ref": "https://example.org/schema"}), "retriev"),
        (Grammar.of_json({"not": {}}), "not"),
        (Grammar.of_json({"minimum": 3, "maximum": 2, "type": "integer"}), "minimum"),
        (Grammar.of_json({"enum": [f"{i:010}" for i in range(30000)]}), "characters"),
        (Grammar.of_json(False), "schema"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[" * 10**5), "no JSON schema"),
        (Grammar(GrammarKind.JSON_SCHEMA, "5"), "schema"),
        (regex("a" * (MAX_GRAMMAR_LENGTH + 1)), "characters"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_unusable_grammar_is_refused(engine: Engine, grammar: Grammar, reason: str) -> None:
    named = Grammar(grammar.kind, grammar.text, "response_format")
    with pytest.raises(RequestError, match=f"(?s)^response_format .*{reason}") as caught:
        engine.add_request("x", [5], SamplingParams(grammar=named))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not engine.has_unfinished


@pytest.mark.parametrize("option", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_refuses_what_contradicts_a_grammar(option: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"grammar .*{next(iter(option))}"):
        SamplingParams(grammar=regex("a"), **option)


def test_a_grammar_that_comes_to_cost_too_much_ends_its_sequence(engine: Engine) -> None:
    both = {
        "costly": SamplingParams(grammar=regex("((a{1000}){1000}){1000}"), max_tokens=50),
        "cheap ": SamplingParams(grammar=regex("b{30}"), max_tokens=50),
    }
    completions = generate(engine, both)
    assert completions["costly"][0].finish_reason is FinishReason.ABORT
    assert completions["cheap "][0].text == "b" * 30


@pytest.mark.parametrize(
    "grammar", [regex("ab"), lark("start: <|im_end|>"), lark('start: "a" <[2]>')]
)
def test_a_grammar_that_wants_what_ends_the_text_ends_its_sequence(
    engine: Engine, grammar: Grammar
) -> None:
    (b,) = tiny_tokenizer().encode("b")
    (completion,) = guided(engine, grammar, stop_token_ids=(b,))
    assert completion.finish_reason is FinishReason.ABORT


def test_a_model_without_an_end_takes_no_grammar() -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), 320, [])
    with pytest.raises(RequestError, match="end-of-text"):
        compiler.check(regex("a"))


def test_a_grammar_is_a_value() -> None:
    grammar = Grammar.of_json(PERSON, "response_format")
    assert pickle.loads(pickle.dumps(grammar)) == grammar == Grammar.of_json(PERSON)
