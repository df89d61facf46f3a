"""What the models of all requests have in common.

Bodies are checked on the event loop, where all others wait: lists and dicts have bounds, and of
what is wrong with a list's items only the first is told (`fail_fast`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

MAX_FIELDS = 100
"""Of one object: more than any has."""


def _encodable(text: str) -> str:
    """JSON can spell halves of surrogate pairs, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode, without unpaired surrogates") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def at_most(count: int) -> BeforeValidator:
    """Refuses a dict with more entries before it looks at any of them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"must have at most {count} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


class RequestModel(BaseModel):
    """Part of a request: what it does not know is refused, and null is the same as nothing."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if len(data) > MAX_FIELDS:
                raise ValueError(f"an object of the body has {len(data)} fields")
            return {name: value for name, value in data.items() if value is not None}
        return data
