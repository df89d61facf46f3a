"""Times each pass of quantizing a random model of a given shape, and the memory that it takes.

python benchmarks/quantize_scale.py --config benchmarks/configs/llama-3-8b [--layers 2] [--recipe qoq]
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.formats.checkpoint import CheckpointWriter
from qserve.models import names
from qserve.models.source import WeightSource
from qserve.quant import layer, linear, pipeline, rounding
from qserve.quant.recipe import RECIPES

STEPS: dict[str, tuple[Any, str]] = {
    "trial layers": (pipeline.Job, "_trial_errors"),
    "reading": (pipeline, "read_layer"),
    "passes": (layer.LayerQuantizer, "_prepared"),
    "second moments": (linear.LinearQuantizer, "moments"),
    "propagation": (linear, "propagated"),
    "grid": (linear.LinearQuantizer, "_grid"),
    "factorization": (rounding.InverseFactor, "of"),
    "GPTQ": (linear, "gptq"),
    "a layer in all": (layer.LayerQuantizer, "quantize"),
    "writing": (CheckpointWriter, "write"),
    "state": (CheckpointWriter, "save_state"),
}
"""What is timed; steps may be parts of others."""


class RandomText:
    """A tokenizer whose every text is random tokens."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, text: str, **_: Any) -> dict[str, Sequence[int]]:
        generator = torch.Generator().manual_seed(0)
        return {
            "input_ids": torch.randint(self._vocab_size, (2**18,), generator=generator).tolist()
        }


class RandomSource(WeightSource):
    """Random weights of unit outputs for unit inputs, drawn anew at every reading."""

    def __init__(self, hf_config: dict[str, Any], device: str) -> None:
        self.hf_config, self._device = hf_config, device
        self._shapes = names.tensor_shapes(self.config)

    def names(self) -> set[str]:
        return set(self._shapes)

    def tensor(self, name: str) -> Tensor:
        shape, dtype = self._shapes[name], self.config.dtype
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name), dtype=dtype)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(shape, dtype=dtype, device=self._device)
        return drawn.normal_(std=shape[1] ** -0.5, generator=generator).cpu()

    def tokenizer(self) -> RandomText:
        return RandomText(self.config.vocab_size)

    def save_tokenizer(self, directory: Path) -> None:
        """Nothing."""


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which also notes how long it takes until the device is done."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        start = _now()
        result = function(*arguments, **options)
        seconds.append(_now() - start)
        return result

    return run


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Quantize, then print seconds by step and peak memory."""
    parser = argparse.ArgumentParser(description="Time the quantization of a random model.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="qoq")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    hf_config = json.loads((options.config / "config.json").read_text())
    if options.layers:
        hf_config["num_hidden_layers"] = options.layers
    seconds: dict[str, list[float]] = defaultdict(list)
    for step, (owner, name) in STEPS.items():
        setattr(owner, name, timed(getattr(owner, name), seconds[step]))
    source = RandomSource(hf_config, options.device)
    with tempfile.TemporaryDirectory() as directory:
        start = _now()
        pipeline.quantize(source, Path(directory) / "model", options.recipe, device=options.device)
        total = _now() - start
    for step, each in seconds.items():
        print(
            f"{step:16} {len(each):5d} x {sum(each) / max(1, len(each)):8.3f} s = {sum(each):8.2f} s"
        )
    print(f"{source.config.num_layers} layers in {total:.1f} s")
    print(f"host {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at the peak")
    if torch.cuda.is_available():
        print(
            f"device {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB allocated, "
            f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB reserved at the peak"
        )


if __name__ == "__main__":
    main()
