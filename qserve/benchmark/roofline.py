"""The least time that the parts of a decode step take, by what this GPU reaches in this run."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.benchmark.kernels import Ceilings
from qserve.formats.kv import KVFormat
from qserve.models.config import ModelConfig
from qserve.models.names import linear_shapes

REST = "sampling, indices"
"""The part of a step that samples tokens and moves what the step is told."""


@dataclass(frozen=True)
class Roofline:
    """The larger of bytes over bandwidth and operations over the tensor cores' rate.

    group_size: of 4-bit weights, -1 for per-channel. 16-bit products run at half the rate of 8-bit
    ones.
    """

    model: ModelConfig
    kv_format: KVFormat
    group_size: int
    ceilings: Ceilings

    def part_times(self, batch: int, context: int) -> dict[str, float]:
        """Part of a step -> microseconds, for `batch` sequences that hold `context` tokens."""
        layers = self.model.num_layers
        return {
            "GEMM": layers * self._linears(batch),
            "attention": layers * self._bytes(batch * context * self.kv_format.bytes_per_token),
            "append": layers * self._bytes(batch * self._append_bytes()),
            "producers": layers * self._bytes(batch * self._producer_bytes()),
            "lm_head": self._lm_head(batch),
            REST: self._bytes(batch * self.model.vocab_size * 4),
        }

    def _linears(self, batch: int) -> float:
        """Each of a layer's linears by itself: one bound by bytes cannot lend another its time."""
        scales = 0 if self.group_size == -1 else 2 / self.group_size
        return sum(
            max(
                self._bytes(rows * columns * (0.5 + scales) + batch * (columns + 2 * rows)),
                2 * batch * rows * columns / self.ceilings.tensor_rate * 1e6,
            )
            for rows, columns in linear_shapes(self.model).values()
        )

    def _append_bytes(self) -> int:
        """Of a token: qkv in, q out, codes and scales out."""
        model = self.model
        qkv = model.query_size + 2 * model.kv_size
        return 2 * (qkv + model.query_size) + self.kv_format.bytes_per_token

    def _producer_bytes(self) -> int:
        """Of a token: two norms (x and residual in, sum and codes out), SiLU * up, the attention's
        output."""
        hidden, model = self.model.hidden_size, self.model
        return 2 * hidden * (2 + 2 + 2 + 1) + model.intermediate_size * 5 + model.query_size * 3

    def _lm_head(self, batch: int) -> float:
        rows, columns = self.model.vocab_size, self.model.hidden_size
        moved = 2 * rows * (columns + batch)
        return max(self._bytes(moved), 4 * batch * rows * columns / self.ceilings.tensor_rate * 1e6)

    def _bytes(self, count: float) -> float:
        return count / self.ceilings.copy_bandwidth * 1e6
