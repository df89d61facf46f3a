"""What users set, as frozen values that are checked once and never change."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("auto", "float16", "bfloat16", "float32")


class ConfigError(ValueError):
    """A setting out of range; the message names the field and the value."""


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs.

    max_num_sequences: sequences that decode together at most.
    max_batched_tokens: tokens computed per step at most, decodes and prefill chunks together.
    max_model_len: tokens of prompt and output together at most; None takes the model's own limit.
    kv_bits: bits per element of the key-value cache, 4, 8 or 16; None is what the checkpoint says,
        or 16 for a model that is not quantized.
    num_pages: pages of the cache, 64 tokens each; None takes what the memory holds and the limits
        above can use.
    gpu_memory_utilization: share of the device's free memory that the cache may take (of the
        host's, without a GPU).
    enable_prefix_caching: share the pages of equal prompt beginnings between requests.
    dtype: of the activations; "auto" is the checkpoint's on a GPU, float32 on a CPU.
    device: "auto" is the GPU where there is one.
    """

    max_num_sequences: int = 64
    max_batched_tokens: int = 1024
    max_model_len: int | None = None
    kv_bits: int | None = None
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_num_sequences", "max_batched_tokens", "max_model_len", "num_pages"):
            _check_positive(name, getattr(self, name), name in ("max_model_len", "num_pages"))
        if self.max_batched_tokens < self.max_num_sequences:
            raise ConfigError(
                f"max_batched_tokens {self.max_batched_tokens} is below max_num_sequences "
                f"{self.max_num_sequences}: every running sequence needs one token a step"
            )
        if self.kv_bits not in (None, 4, 8, 16):
            raise ConfigError(f"kv_bits must be 4, 8 or 16, got {self.kv_bits!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization!r}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens and how much it takes on.

    port: 0 is any free one. max_requests: prompts held at a time, running and waiting together;
        more are refused until some are finished.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_requests: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must lie in [0, 65535], got {self.port!r}")
        _check_positive("max_requests", self.max_requests, optional=False)


def _check_positive(name: str, value: object, optional: bool) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
