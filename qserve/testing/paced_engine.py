"""The engine with all that the host does for a step, over a device that only takes time."""

from __future__ import annotations

import time
from itertools import cycle, islice
from pathlib import Path

import torch

from qserve.config import EngineConfig
from qserve.engine.batch import StepShape, stage
from qserve.engine.device import DevicePolicy
from qserve.engine.engine import Engine
from qserve.engine.loading import load_model
from qserve.engine.logprobs import Place
from qserve.engine.request import RequestOutput, TokenLogprob
from qserve.engine.sampler import Row
from qserve.engine.scheduler import StepPlan
from qserve.engine.step import StepUnderWay
from qserve.models.tokenizer import load_tokenizer
from qserve.testing.tiny import tiny_config, tiny_source

_SIZES = {"num_hidden_layers": 1, "num_key_value_heads": 1, "max_position_embeddings": 8192}


class PacedEngine(Engine):
    """Plans, stages, commits and writes text as it does for a GPU, a step ahead of it.

    A sequence's tokens are those of `text`, over and over, from the place that the first token of
    its prompt counts.

    tokenizer: a directory that holds one. step_seconds: how long the device works for a step.
    """

    def __init__(
        self, tokenizer: Path, text: str, step_seconds: float, max_num_sequences: int
    ) -> None:
        spelled = load_tokenizer(tokenizer)
        source = tiny_source(tiny_config() | _SIZES | {"vocab_size": len(spelled)})
        policy = DevicePolicy(1, max_num_sequences, 8192)
        config = EngineConfig(kv_bits=4, num_pages=24 * max_num_sequences)
        decoder = load_model(source, config).decoder
        super().__init__(decoder, spelled, config, policy=policy)
        self._text: list[int] = spelled.encode(text, add_special_tokens=False)
        self._step_seconds = step_seconds
        self._device_is_free = 0.0
        self.thread_seconds = 0.0
        """Of a CPU, for all steps; the thread that makes them."""

    def tokens(self, place: int, count: int) -> list[int]:
        """What a sequence whose prompt begins with `place` is given."""
        start = place % len(self._text)
        return list(islice(cycle(self._text), start, start + count))

    def step(self) -> list[RequestOutput]:
        start = time.thread_time()
        outputs = super().step()
        self.thread_seconds += time.thread_time() - start
        return outputs

    def _launch(self, plan: StepPlan) -> StepUnderWay:
        sources = {sequence: 0 for sequence in plan.sampled}
        stage(plan, StepShape.of(plan), sources, scratch_page=0, pinned=False)
        rows = [Row(chunk.sequence, chunk.end) for chunk in plan.chunks if chunk.samples]
        self._sampler.sample(torch.zeros(len(rows), 1), rows)
        token_ids = torch.tensor([self._token(row) for row in rows])
        self._device_is_free = max(self._device_is_free, time.perf_counter()) + self._step_seconds
        return _PacedStep(plan, token_ids, self._device_is_free)

    def _token(self, row: Row) -> int:
        place = row.sequence.token_ids[0] + row.num_tokens - row.sequence.num_prompt_tokens
        return self._text[place % len(self._text)]


class _PacedStep(StepUnderWay):
    """due: when the device has done it."""

    def __init__(self, plan: StepPlan, token_ids: torch.Tensor, due: float) -> None:
        super().__init__(plan, token_ids, [])
        self._due = due

    def wait(self) -> tuple[list[int], list[tuple[Place, TokenLogprob]]]:
        time.sleep(max(0.0, self._due - time.perf_counter()))
        return super().wait()
