"""Text to evaluate on, and the windows it is cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from qserve.engine.text import encode
from qserve.models.config import first_line


class TextError(ValueError):
    """A text cannot be had or is too short; the message says why."""


@dataclass(frozen=True)
class _HubFile:
    """One Parquet file of a data set on the hub, with a column "text"."""

    repository: str
    path: str


DATASETS = {
    "wikitext2": _HubFile("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}
"""Test splits by name."""


def read_text(path: Path) -> str:
    """A file of UTF-8 text; TextError if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def dataset_text(name: str) -> str:
    r"""A data set's test split, its lines joined by "\n\n" as is customary for perplexity.

    Comes from the hub, or from its local cache once it is there.
    """
    if name not in DATASETS:
        raise TextError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise TextError("to read data sets: pip install 'qserve[evaluation]'") from error
    file = DATASETS[name]
    try:
        path = huggingface_hub.hf_hub_download(file.repository, file.path, repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TextError(f"{name}: the hub does not give it: {first_line(error)}") from error
    return "\n\n".join(parquet.read_table(path, columns=["text"])["text"].to_pylist())


def text_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, max_windows: int | None = None
) -> list[Sequence[int]]:
    """The first `max_windows` windows of `length` tokens, without overlap.

    The text is tokenized once, as prompts are; a rest that fills no window is dropped.
    """
    if length < 2:
        raise TextError(f"a window must have at least 2 tokens, got {length}")
    token_ids = encode(tokenizer, text)
    starts = range(0, len(token_ids) - length + 1, length)[:max_windows]
    if not starts:
        raise TextError(f"the text has {len(token_ids)} tokens, less than one window of {length}")
    return [token_ids[start : start + length] for start in starts]
