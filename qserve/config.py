"""What users set, as frozen values that are checked once and never change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

TOOL_PARSERS = ("hermes", "llama3")
DTYPES = ("auto", "float16", "bfloat16", "float32")


class ConfigError(ValueError):
    """A setting out of range; the message names the field and the value."""


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs.

    max_num_sequences: sequences that decode together at most; None is what suits the device.
    max_batched_tokens: tokens computed per step at most, decodes and prefill chunks together. More
        is faster, fewer keep those who decode from waiting for others' prompts; None is for speed.
    max_model_len: tokens of prompt and output together at most; None takes the model's own limit.
    kv_bits: bits per element of the key-value cache, 4, 8 or 16; None is what the checkpoint says,
        or 16 for a model that is not quantized.
    activation_bits: bits of what quantized weights are multiplied with, 8 or 16 (the weights are
        then dequantized at load); None is what the checkpoint says.
    num_pages: pages of the cache, 64 tokens each; None takes what the memory holds and the limits
        above can use.
    gpu_memory_utilization: share of the memory that is free beside the weights, of the GPU or else
        of the host, which the cache and the steps may take.
    enable_prefix_caching: share the pages of equal prompt beginnings between requests.
    dtype: of the activations; "auto" is the checkpoint's on a GPU, float32 on a CPU.
    device: "auto" is the GPU where there is one.
    """

    max_num_sequences: int | None = None
    max_batched_tokens: int | None = None
    max_model_len: int | None = None
    kv_bits: int | None = None
    activation_bits: int | None = None
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_num_sequences", "max_batched_tokens", "max_model_len", "num_pages"):
            _check_positive(name, getattr(self, name), optional=True)
        if self.max_model_len == 1:
            raise ConfigError("max_model_len 1 leaves no room for a token after a prompt")
        if (self.max_batched_tokens or math.inf) < (self.max_num_sequences or 0):
            raise ConfigError(
                f"max_batched_tokens {self.max_batched_tokens} is below max_num_sequences "
                f"{self.max_num_sequences}: every running sequence needs one token a step"
            )
        if self.kv_bits not in (None, 4, 8, 16):
            raise ConfigError(f"kv_bits must be 4, 8 or 16, got {self.kv_bits!r}")
        if self.activation_bits not in (None, 8, 16):
            raise ConfigError(f"activation_bits must be 8 or 16, got {self.activation_bits!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization!r}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, whom it answers, and how much it takes on.

    port: 0 is any free one.
    max_requests: sequences (prompts times `n`) held at a time, running and waiting together; more
        are refused until some are finished.
    max_body_bytes: longest body of a request.
    request_timeout: seconds from a request's admission to its last token; None is any number.
    api_keys: what clients must show one of to generate text; none: nothing is asked of them.
    cors_origins: web sites whose pages may use the server; "*" is any.
    tls_certificate, tls_key: PEM files, both or neither; with them, the server speaks HTTPS only.
    tool_parser: how the model writes calls of tools, one of TOOL_PARSERS; None is as its chat
        template teaches it.
    log_requests: write a line of JSON per request to stdout.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_requests: int = 2048
    max_body_bytes: int = 8 * 2**20
    request_timeout: float | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tool_parser: str | None = None
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must lie in [0, 65535], got {self.port!r}")
        for name in ("max_requests", "max_body_bytes"):
            _check_positive(name, getattr(self, name), optional=False)
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(f"request_timeout must be positive, got {self.request_timeout!r}")
        if not all(self.api_keys):
            raise ConfigError("api_keys holds an empty key")
        if self.tool_parser not in (None, *TOOL_PARSERS):
            raise ConfigError(
                f"tool_parser must be one of {', '.join(TOOL_PARSERS)}, got {self.tool_parser!r}"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together")


def _check_positive(name: str, value: object, optional: bool) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
