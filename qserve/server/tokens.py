"""The endpoints that turn text into tokens and back."""

from __future__ import annotations

from qserve.server.errors import check_model
from qserve.server.protocol import DetokenizeRequest, TokenizeRequest
from qserve.server.responses import Detokenized, Tokens
from qserve.server.text import TextCodec


class TokenService:
    """Tokens as the served model sees them, the ones it wants around a text included."""

    def __init__(self, codec: TextCodec, model_name: str) -> None:
        self._codec = codec
        self._model = model_name

    async def tokenize(self, body: TokenizeRequest) -> Tokens:
        """The tokens that a completion of `prompt`, or a chat of `messages`, would begin with."""
        check_model(body.model, self._model)
        if body.messages is not None:
            tokens = await self._codec.encode_chat(
                body.messages, body.tools or (), body.chat_template_kwargs
            )
        else:
            tokens = await self._codec.encode_prompt(body.prompt or "")
        return Tokens(tokens=tokens, count=len(tokens))

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        """The text of tokens, special ones included."""
        check_model(body.model, self._model)
        return Detokenized(prompt=await self._codec.decode_checked(body.tokens))
