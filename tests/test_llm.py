"""Offline generation: prompts in, completions out, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_helpers import TOKENIZER

from qserve import LLM, SamplingParams
from qserve.engine.request import RequestError, RequestOutput
from qserve.testing.tiny import save_tiny_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path: Path = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    yield LLM(path, max_num_sequences=3, max_batched_tokens=32, kv_bits=8)


def test_llm_generates_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, seed=3, n=2)
    together = llm.generate(["one", "two", "three"], params)
    apart = [llm.generate(prompt, params)[0] for prompt in ("one", "two", "three")]
    ids = TOKENIZER.encode("two")
    assert [g.completions for g in together] == [g.completions for g in apart]
    assert [len(g.completions) for g in together] == [2, 2, 2]
    assert llm.generate(ids, params)[0].completions == together[1].completions
    assert llm.generate([ids, ids], params)[1].text == together[1].text
    assert llm.generate([]) == []


def test_llm_chats(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, temperature=0)
    chat = [{"role": "user", "content": "Hi"}]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    (answer,) = llm.chat(chat, params)
    assert TOKENIZER.decode(answer.prompt_token_ids) == prompt
    assert answer.text == llm.generate(prompt, params)[0].text
    assert [g.text for g in llm.chat([chat, chat], params)] == [answer.text] * 2


def test_llm_refuses_all_prompts_if_one_is_bad(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[1, 2], []])
    assert not llm.engine.has_unfinished


def test_an_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=5, seed=3)
    step, steps = llm.engine.step, 0

    def interrupted() -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["one", "two"], params)
    assert not llm.engine.has_unfinished
    assert len(llm.generate("three", params)[0].completions[0].token_ids) == 5
