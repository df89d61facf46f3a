"""Streams of text join to the whole, characters stay whole, and stop strings are found anywhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qserve.engine.request import RequestError
from qserve.engine.text import (
    REPLACEMENT,
    Detokenizer,
    StopMatcher,
    TextStream,
    encode,
    encode_chat,
)
from qserve.testing.tiny import tiny_tokenizer


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a mark that decodes to a space, unknown text falls to
    bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcé", "▁a", "bc"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("b", "c")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


BYTE_LEVEL, SENTENCEPIECE = tiny_tokenizer(), sentencepiece_like_tokenizer()
both_tokenizers = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "sentencepiece"]
)


def stream(tokenizer: Any, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.feed, token_ids), detokenizer.flush()]


@both_tokenizers
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abc é€🦙 \n"), max_size=24))
def test_whole_characters_stream_and_join_to_the_whole_text(tokenizer: Any, text: str) -> None:
    token_ids = encode(tokenizer, text)
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any(REPLACEMENT in piece for piece in pieces)
    if tokenizer is BYTE_LEVEL:
        assert "".join(pieces) == text
        assert [piece for piece in pieces if piece] == list(text)


@settings(max_examples=200, deadline=None)
@given(token_ids=st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=24))
def test_broken_bytes_join_to_the_text_decoded_at_once(token_ids: list[int]) -> None:
    pieces = stream(BYTE_LEVEL, token_ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)


@both_tokenizers
def test_special_tokens_are_no_text_and_part_no_words(tokenizer: Any) -> None:
    special = tokenizer.eos_token_id
    token_ids = [token for part in encode(tokenizer, "a a a") for token in (part, special, special)]
    assert "".join(stream(tokenizer, token_ids)) == "a a a"


def test_half_a_character_waits_and_is_replaced_only_at_the_end() -> None:
    llama = encode(BYTE_LEVEL, "🦙")
    assert stream(BYTE_LEVEL, llama) == ["", "", "", "🦙", ""]
    assert stream(BYTE_LEVEL, llama[:3]) == ["", "", "", REPLACEMENT]


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the stop string that is complete first, and of those the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stops_do_not_depend_on_how_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher, given_out, found, fed = StopMatcher(stops), "", None, ""
    for piece in pieces:
        text, found = matcher.feed(piece)
        given_out, fed = given_out + text, fed + piece
        if found:
            break
        held = fed[len(given_out) :]
        assert not held or any(s.startswith(held) and s != held for s in stops)
    else:
        given_out += matcher.flush()
    assert (given_out, found) == first_stop("".join(pieces), stops)


def test_a_stream_joins_characters_and_stops() -> None:
    text = TextStream(BYTE_LEVEL, ["€uro"])
    deltas = [text.feed(token) for token in encode(BYTE_LEVEL, "é€é€uro")]
    assert "".join(delta.text for delta in deltas) == "é€é"
    assert [delta.stop for delta in deltas if delta.stop] == ["€uro"]


def test_held_text_comes_out_in_the_end() -> None:
    text = TextStream(BYTE_LEVEL, ["stop"])
    given_out = "".join(text.feed(token).text for token in encode(BYTE_LEVEL, "a sto"))
    assert given_out == "a "
    assert text.flush() == ("sto", None)


def test_stops_count_after_min_tokens_only() -> None:
    text = TextStream(BYTE_LEVEL, ["b"], min_tokens=2)
    deltas = [text.feed(token) for token in encode(BYTE_LEVEL, "abcb")]
    assert [(delta.text, delta.stop) for delta in deltas] == [
        ("a", None),
        ("b", None),
        ("c", None),
        ("", "b"),
    ]


def test_chats_are_rendered_up_to_the_answer_and_refusals_are_clear() -> None:
    token_ids = encode_chat(BYTE_LEVEL, [{"role": "user", "content": "Hi"}])
    assert BYTE_LEVEL.decode(token_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(RequestError, match="no chat template"):
        encode_chat(SENTENCEPIECE, [{"role": "user", "content": "Hi"}])
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        encode_chat(strict, [{"role": "user", "content": "Hi"}])


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    """JSON and Python let it through: in prompts, and in all that a template writes into one."""
    with pytest.raises(RequestError, match="surrogate"):
        encode(BYTE_LEVEL, "a\ud800")
    with pytest.raises(RequestError, match="surrogate"):
        encode_chat(BYTE_LEVEL, [{"role": "user", "content": "\ud800"}])
