"""Producers on a GPU: one launch, one block per token; contracts and reference are in `fused`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.jit import Kernel
from qserve.kernels.op import OpError

VECTOR = 8
"""Elements read at once."""

_PARAMETERS = {
    "rms_norm": "P(3Pf)P",
    "rms_norm_quantize": "P(3Pf)(3P)",
    "silu_mul_quantize": "P(3P)",
    "quantize_per_token": "P(3P)",
}
PRODUCERS = tuple(_PARAMETERS)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `fused.rms_norm`."""
    total = x if residual is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    _launch("rms_norm", x, x.shape[1], weight, (x, residual, weight, total, eps, normed))
    return normed, total


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[QuantizedActivation, Tensor]:
    """See `fused.rms_norm_quantize`."""
    total = x if residual is None else torch.empty_like(x)
    out = QuantizedActivation.empty(len(x), x.shape[1], x.device)
    arguments = (x, residual, weight, total, eps, *_pointers(out))
    _launch("rms_norm_quantize", x, x.shape[1], weight, arguments)
    return out, total


def silu_mul_quantize(gate_up: Tensor) -> QuantizedActivation:
    """See `fused.silu_mul_quantize`."""
    columns = gate_up.shape[1] // 2
    out = QuantizedActivation.empty(len(gate_up), columns, gate_up.device)
    _launch("silu_mul_quantize", gate_up, columns, None, (gate_up, *_pointers(out)))
    return out


def quantize_per_token(x: Tensor) -> QuantizedActivation:
    """See `fused.quantize_per_token`."""
    out = QuantizedActivation.empty(len(x), x.shape[1], x.device)
    _launch("quantize_per_token", x, x.shape[1], None, (x, *_pointers(out)))
    return out


@cache
def producer_kernel(op: str, columns: int, bfloat16: bool, float_weight: bool) -> Kernel:
    """The variant of `op` for rows of `columns` elements; float_weight: the norm's is float32."""
    weight = "float" if float_weight else "unsigned short"
    return Kernel(
        "producers.cu",
        op,
        parameters=_PARAMETERS[op],
        threads=_threads(columns),
        overlap=True,
        constants={"COLUMNS": columns, "THREADS": _threads(columns), "BFLOAT16": bfloat16},
        generated=f"using NormWeight = {weight};\n",
    )


def _threads(columns: int) -> int:
    """Whole warps, about four vectors a thread, at most 512 threads."""
    warps = -(-columns // (VECTOR * 32 * 4))
    return 32 * min(16, max(2, warps))


def _launch(
    op: str, x: Tensor, columns: int, weight: Tensor | None, arguments: tuple[object, ...]
) -> None:
    _require(x.dtype in (torch.float16, torch.bfloat16), op, f"on a GPU, {x.dtype} is not served")
    _require(columns % VECTOR == 0, op, f"rows of {columns} are not a multiple of {VECTOR}")
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    _require(all(tensor.is_contiguous() for tensor in tensors), op, "tensors must be contiguous")
    float_weight = weight is not None and weight.dtype == torch.float32
    if weight is not None:
        _require(
            float_weight or weight.dtype == x.dtype, op, f"weight must be {x.dtype} or float32"
        )
    if len(x):
        kernel = producer_kernel(op, columns, x.dtype == torch.bfloat16, float_weight)
        kernel(x.device, (len(x),), arguments)


def _require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise OpError(f"{op}: {message}")


def _pointers(out: QuantizedActivation) -> tuple[Tensor, Tensor, Tensor]:
    return out.codes, out.scale, out.row_sum
