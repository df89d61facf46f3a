"""QServe: W4A8KV4 quantization and serving of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qserve.engine.llm import LLM
    from qserve.engine.request import Grammar, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Grammar", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "qserve.engine.llm",
    "Grammar": "qserve.engine.request",
    "SamplingParams": "qserve.engine.request",
}


def __getattr__(name: str) -> Any:
    """Import the public classes on first use: `import qserve` itself stays free of torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
