"""Generation as it is specified: one sequence, one token at a time, and nothing else.

No batching, no scheduler, no chunks, no sharing: the oracle that the engine must equal token by
token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qserve.engine.request import SamplingParams
from qserve.engine.sampler import Row, Sampler
from qserve.engine.sequence import Sequence, sequence_seed
from qserve.formats.kv import KVFormat
from qserve.formats.layout import PAGE_TOKENS
from qserve.kernels.paged import PagedBatch
from qserve.models.attention import PagedAttention
from qserve.models.decoder import Decoder
from qserve.models.rope import rope_table


@torch.inference_mode()
def naive_generate(
    decoder: Decoder,
    prompt_token_ids: list[int],
    params: SamplingParams,
    kv_format: KVFormat,
    index: int = 0,
    hadamard: bool = False,
) -> list[int]:
    """The tokens that sequence `index` of a request must get; stop strings are not looked at.

    `params.max_tokens` must be given.
    """
    assert params.max_tokens is not None
    max_length = len(prompt_token_ids) + params.max_tokens
    ends = frozenset(params.stop_token_ids)
    ends |= frozenset() if params.ignore_eos else frozenset(decoder.config.eos_token_ids)
    seed = sequence_seed(params.seed, index)
    sequence = Sequence("naive", index, params, list(prompt_token_ids), seed, max_length, ends)
    forward = _TokenByToken(decoder, kv_format, max_length, hadamard)
    for token_id in prompt_token_ids[:-1]:
        forward(token_id)
    while sequence.finish_reason is None:
        hidden = forward(sequence.token_ids[-1])
        row = Row(sequence, len(sequence.token_ids))
        sequence.append(int(Sampler().sample(decoder.logits(hidden), [row])))
    return sequence.token_ids[len(prompt_token_ids) :]


class _TokenByToken:
    """A decoder over a private pool just large enough, whose pages lie in order."""

    def __init__(
        self, decoder: Decoder, kv_format: KVFormat, max_length: int, hadamard: bool
    ) -> None:
        self._decoder = decoder
        num_pages = -(-max_length // PAGE_TOKENS)
        pools = [kv_format.new_pool(num_pages, decoder.device) for _ in decoder.layers]
        self._pools = torch.stack(pools)
        self._page_table = torch.arange(num_pages, dtype=torch.int32, device=decoder.device)[None]
        table = rope_table(decoder.config, max_length).to(decoder.device)
        self._attention = PagedAttention(
            decoder.config,
            self._batch(0),
            self._pools,
            table,
            kv_format,
            hadamard,
            decoder.key_centers,
        )
        self._position = 0

    def __call__(self, token_id: int) -> Tensor:
        """Hidden state [1, H] of the next token."""
        attend = replace(self._attention, batch=self._batch(self._position))
        self._position += 1
        return self._decoder.forward(self._tensor(token_id), attend)

    def _batch(self, position: int) -> PagedBatch:
        here = self._tensor(position)
        return PagedBatch(
            positions=here,
            slots=here,
            query_start=torch.tensor([0, 1], dtype=torch.int32, device=here.device),
            context_lens=(here + 1).int(),
            page_table=self._page_table,
            max_query_len=1,
            max_context_len=position + 1,
        )

    def _tensor(self, value: int) -> Tensor:
        return torch.tensor([value], device=self._decoder.device)
