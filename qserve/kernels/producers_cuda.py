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

MOST_EARLY_ROWS = 8
"""Of SiLU that may start before the GEMM ahead has ended: more crowd onto the few multiprocessors that it
leaves free, and cost more than they gain (docs/kernels.md)."""

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
def producer_kernel(
    op: str, columns: int, bfloat16: bool, float_weight: bool, overlap: bool = True
) -> Kernel:
    """The variant of `op` for rows of `columns` elements; float_weight: the norm's is float32.

    overlap: it may start before its predecessor has ended.
    """
    return Kernel(
        "producers.cu",
        op,
        parameters=_PARAMETERS[op],
        threads=row_threads(columns),
        overlap=overlap,
        constants={**row_constants(columns), "BFLOAT16": bfloat16},
        generated=norm_weight_source(float_weight),
    )


def norm_weight_source(is_float: bool) -> str:
    """The type of a norm's weight: float32, or that of the rows."""
    return f"using NormWeight = {'float' if is_float else 'unsigned short'};\n"


def row_threads(columns: int) -> int:
    """That hold a row: whole warps, two vectors a thread, but four before there are more than 256."""
    warps = -(-columns // (VECTOR * 32))
    return 32 * max(2, min(8, -(-warps // 2)), min(16, -(-warps // 4)))


def row_constants(columns: int) -> dict[str, int]:
    """Of csrc/quantize_row.cuh."""
    return {"COLUMNS": columns, "THREADS": row_threads(columns)}


def _launch(
    op: str, x: Tensor, columns: int, weight: Tensor | None, arguments: tuple[object, ...]
) -> None:
    objection = _objection(x, columns, weight, arguments)
    if objection:
        raise OpError(f"{op}: {objection}")
    if x.shape[0]:
        float_weight = weight is not None and weight.dtype == torch.float32
        early = op != "silu_mul_quantize" or len(x) <= MOST_EARLY_ROWS
        kernel = producer_kernel(op, columns, x.dtype == torch.bfloat16, float_weight, early)
        kernel(x.device, (x.shape[0],), arguments)


def _objection(
    x: Tensor, columns: int, weight: Tensor | None, arguments: tuple[object, ...]
) -> str | None:
    """What the kernels do not take, beyond what the op's contract forbids."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"on a GPU, {x.dtype} is not served"
    if columns % VECTOR:
        return f"rows of {columns} are not a multiple of {VECTOR}"
    if not all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor)):
        return "tensors must be contiguous"
    if weight is not None and weight.dtype not in (torch.float32, x.dtype):
        return f"weight must be {x.dtype} or float32"
    return None


def _pointers(out: QuantizedActivation) -> tuple[Tensor, Tensor, Tensor]:
    return out.codes, out.scale, out.row_sum
