"""How a step is computed: the decoder over the pools of its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from qserve.engine.batch import ForwardBatch
from qserve.engine.kv_cache import allocate_pools
from qserve.engine.threads import StepThreads
from qserve.formats.kv import KVFormat
from qserve.models.attention import PagedAttention
from qserve.models.decoder import Decoder
from qserve.models.rope import rope_table


class ModelRunner:
    """Runs batches of one decoder; owns the pools, uint8 [L, pages, Hkv, block_bytes]."""

    def __init__(
        self,
        decoder: Decoder,
        kv_format: KVFormat,
        num_pages: int,
        max_positions: int,
        hadamard: bool = False,
    ) -> None:
        self._decoder = decoder
        self._kv_format = kv_format
        self._hadamard = hadamard
        layers, device = decoder.config.num_layers, decoder.device
        self._pools = allocate_pools(kv_format, layers, num_pages, device)
        self._rope_table = rope_table(decoder.config, max_positions).to(device)
        self._threads = StepThreads(decoder.config, device)

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    @torch.inference_mode()
    def run(self, batch: ForwardBatch) -> Tensor:
        """Append the batch's keys and values to the cache; return hidden states [T, H]."""
        attend = PagedAttention(
            self._decoder.config,
            batch.paged,
            self._pools,
            self._rope_table,
            self._kv_format,
            self._hadamard,
            self._decoder.key_centers,
        )
        with self._threads.for_tokens(len(batch.token_ids)):
            return self._decoder.forward(batch.token_ids, attend)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, V] of hidden states [n, H]."""
        return self._decoder.logits(hidden)
