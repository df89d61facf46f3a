"""Ops: contract, reference and launcher in one file each. The tensors' device chooses."""

from qserve.kernels.attention import paged_attention, paged_attention_quantize
from qserve.kernels.draw import draw_tokens
from qserve.kernels.fused import (
    quantize_per_token,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from qserve.kernels.gemm import (
    PreparedWeight,
    prepare_weight,
    quantized_linear,
    reference_linear,
)
from qserve.kernels.kv_append import rope_append
from qserve.kernels.op import OpError
from qserve.kernels.paged import PagedBatch

__all__ = [
    "OpError",
    "PagedBatch",
    "PreparedWeight",
    "draw_tokens",
    "paged_attention",
    "paged_attention_quantize",
    "prepare_weight",
    "quantize_per_token",
    "quantized_linear",
    "reference_linear",
    "rms_norm",
    "rms_norm_quantize",
    "rope_append",
    "silu_mul",
    "silu_mul_quantize",
]
