"""One decoder for the Llama family (Llama, Mistral, Qwen2, Qwen3) at every precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.models.config import ModelConfig
from qserve.models.layers import Addend, Attend, Head, Linear, RMSNorm


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each query and key head of qkv (Qwen3)."""

    query: RMSNorm
    key: RMSNorm
    num_heads: int
    num_kv_heads: int

    def __call__(self, qkv: Tensor) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) D], its heads normed but for the values."""
        head_dim = self.query.weight.shape[0]
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = qkv.split([heads * head_dim for heads in sizes], dim=-1)
        normed_query, _ = self.query(query.reshape(-1, head_dim))
        normed_key, _ = self.key(key.reshape(-1, head_dim))
        return torch.cat((normed_query.view_as(query), normed_key.view_as(key), value), dim=-1)


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and gated MLP, each behind a norm and added to the residual stream.

    qkv: the q, k and v projections along N. gate_up: gate and up along N.
    """

    attention_norm: RMSNorm
    qkv: Linear
    head_norm: HeadNorm | None
    output: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear

    def __call__(
        self, x: Addend, residual: Tensor | None, attend: Attend, layer_index: int
    ) -> tuple[Addend, Tensor]:
        """x, residual [T, H] -> (what the MLP adds, the residual stream before it), [T, H] both.

        The sum is left to the next norm, which fuses it; `residual` is None at the first layer.
        """
        qkv, residual = self.qkv.after_norm(self.attention_norm, x, residual)
        if self.head_norm is not None:
            qkv = self.head_norm(qkv)
        x = self.output.after_attention(attend, layer_index, qkv)
        gate_up, residual = self.gate_up.after_norm(self.mlp_norm, x, residual)
        return self.down.after_silu_mul(gate_up), residual


@dataclass(frozen=True)
class Decoder:
    """A whole model: embedding [V, H], layers, final norm, lm_head [V, H] (the embedding if tied).

    key_centers: float32 [L, Hkv, D], what attention subtracts from keys before storing them, or None.
    """

    config: ModelConfig
    embedding: Tensor
    layers: list[DecoderLayer]
    norm: RMSNorm
    lm_head: Head
    key_centers: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of activations outside of integer GEMMs."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def forward(self, token_ids: Tensor, attend: Attend) -> Tensor:
        """Token ids [T] -> hidden states [T, H] after the final norm."""
        x: Addend = self.embedding[token_ids]
        residual = None
        for layer_index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, attend, layer_index)
        hidden, _ = self.norm(x, residual)
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states [n, H] of `forward` -> [n, V], in `out` of `empty_logits` if given."""
        return self.lm_head(hidden, out)

    def empty_logits(self, rows: int) -> Tensor:
        """Memory for the logits of so many rows or fewer, [rows or more, V]."""
        return self.lm_head.empty(rows)
