"""Between text and tokens, for requests and for the log probabilities in answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from qserve.engine.request import RequestError
from qserve.engine.text import NO_SETTINGS, REPLACEMENT, encode, encode_chat
from qserve.server.protocol import ChatMessage
from qserve.server.tools import Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "a"


class TextCodec:
    """Encodes prompts and spells out single tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.spell = lru_cache(maxsize=65536)(self._spell)

    async def encode_prompt(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a text, with those the model wants at its beginning; tokens stay."""
        if isinstance(prompt, str):
            return await asyncio.to_thread(encode, self._tokenizer, prompt)
        return prompt

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        settings: Mapping[str, Any] = NO_SETTINGS,
    ) -> list[int]:
        """The tokens of a conversation up to where the assistant speaks, by the model's template.

        settings: of the template. Raises RequestError if there is no template or it refuses the
        conversation.
        """
        conversation = [message.for_template() for message in messages]
        described = [tool.for_template() for tool in tools] or None
        return await asyncio.to_thread(
            encode_chat, self._tokenizer, conversation, described, settings
        )

    async def decode_checked(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that a client names; RequestError if one is out of the vocabulary."""
        size = len(self._tokenizer)
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise RequestError(f"tokens holds {token_id}, which is not a token id below {size}")
        return await asyncio.to_thread(self.decode, token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids))

    def _spell(self, token_id: int) -> tuple[str, list[int] | None]:
        """The text of one token amid others, and its bytes where they are known."""
        text = self.decode([*self._anchor, token_id])[len(self.decode(self._anchor)) :]
        if REPLACEMENT not in text:
            return text, list(text.encode())
        return text, _piece_bytes(self._tokenizer.convert_ids_to_tokens(token_id))

    @cached_property
    def _anchor(self) -> list[int]:
        """Tokens to put before one, as some decoders strip a space at the beginning of a text."""
        return list(self._tokenizer.encode(_ANCHOR, add_special_tokens=False))


def _piece_bytes(piece: str) -> list[int] | None:
    """The bytes of part of a character, as byte-level and byte-fallback vocabularies write them."""
    escaped = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if escaped:
        return [int(escaped[1], 16)]
    alphabet = _byte_level_alphabet()
    return [alphabet[c] for c in piece] if all(c in alphabet for c in piece) else None


@lru_cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, other bytes from U+0100 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
