"""How a step is computed: the decoder over the pools of its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.engine.batch import LatestTokens, Lengths, StepShape, stage
from qserve.engine.device import StepLimits, Work
from qserve.engine.graphs import DecodeGraphs
from qserve.engine.kv_cache import CacheShape, allocate_pools
from qserve.engine.scheduler import StepPlan
from qserve.engine.sequence import Sequence
from qserve.engine.threads import StepThreads
from qserve.kernels.transfer import upload
from qserve.models.attention import PagedAttention
from qserve.models.decoder import Decoder
from qserve.models.rope import rope_table


class ModelRunner:
    """Runs the steps of one decoder; owns the pools, uint8 [L, pages, Hkv, block_bytes].

    capture: how steps of decodes alone are recorded, to be replayed; None: they are not.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: CacheShape,
        limits: StepLimits,
        capture: Callable[[Work], Work] | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        layers, device = decoder.config.num_layers, decoder.device
        self._pools = allocate_pools(cache.kv_format, layers, cache.num_pages + 1, device)
        self._rope_table = rope_table(decoder.config, limits.max_model_len).to(device)
        self._threads = StepThreads(decoder.config, device)
        self._latest = LatestTokens(limits.max_num_sequences, device)
        self._logits = decoder.empty_logits(limits.max_num_sequences)
        self._graphs = None
        if capture is not None:
            sizes = (limits.max_num_sequences, limits.max_pages)
            self._graphs = DecodeGraphs(capture, *sizes, device)

    @property
    def num_pages(self) -> int:
        """That sequences may own."""
        return self._cache.num_pages

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOutput:
        """Compute a plan's tokens, their keys and values appended to the cache."""
        shape = self._graphs.shape_for(plan) if self._graphs else None
        if self._graphs is None or shape is None:
            return self._run_eagerly(plan)
        self._replay(plan, shape)
        return StepOutput(self._logits[: len(plan.sampled)], None)

    def warm_up(self) -> None:
        """Record the steps that are replayed, but for those of long contexts."""
        if self._graphs is not None:
            for shape in self._graphs.common_shapes:
                self._replay(StepPlan(()), shape)

    @torch.inference_mode()
    def remember(self, sequences: Iterable[Sequence], token_ids: Tensor) -> None:
        """The tokens, int64 [S], that the step just run gives: the next step may need them."""
        self._latest.put(sequences, token_ids)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] of hidden states [n, H]."""
        return self._decoder.logits(hidden)

    @torch.inference_mode()
    def _replay(self, plan: StepPlan, shape: StepShape) -> None:
        assert self._graphs is not None
        self._graphs.run(shape, self._stage(plan, shape), self._decode)

    def _stage(self, plan: StepPlan, shape: StepShape) -> Tensor:
        pinned = self.device.type != "cpu"
        return stage(plan, shape, self._latest.sources, self._cache.num_pages, pinned)

    def _run_eagerly(self, plan: StepPlan) -> StepOutput:
        shape = StepShape.of(plan)
        buffer = upload(self._stage(plan, shape), self.device)
        lengths = tuple((chunk.length, chunk.end) for chunk in plan.chunks)
        with self._threads.for_tokens(shape.tokens):
            hidden = self._forward(shape, buffer, lengths)
        rows = shape.views(buffer).sample_rows
        logits = self._decoder.logits(hidden[rows], self._logits)
        return StepOutput(logits, hidden)

    def _decode(self, shape: StepShape, buffer: Tensor) -> None:
        """A step in which every row is sampled."""
        self._decoder.logits(self._forward(shape, buffer), self._logits)

    def _forward(self, shape: StepShape, buffer: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Hidden states [T, H]."""
        tensors = shape.views(buffer)
        attend = PagedAttention(
            self._decoder.config,
            shape.paged(tensors, lengths),
            self._pools,
            self._rope_table,
            self._cache.kv_format,
            self._cache.hadamard,
            self._decoder.key_centers,
        )
        return self._decoder.forward(self._latest.resolve(tensors), attend)


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves on the device until the next one is run.

    logits: [S, V] of the sampled rows. hidden: [T, H], or None where every token is sampled.
    """

    logits: Tensor
    hidden: Tensor | None
