"""`draw_tokens` on a GPU: one launch, a block per row."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qserve.kernels.draw import SHARE_BITS
from qserve.kernels.jit import Kernel

THREADS = 1024

_DIGIT_BITS = 10
"""Of a share, looked at in one pass; they divide its bits."""


def draw_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """See `draw.draw_tokens`."""
    rows, vocab = logits.shape
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        arguments = (logits.contiguous(), draws, token_ids, vocab)
        draw_kernel(logits.dtype)(logits.device, (rows,), arguments)
    return token_ids


@cache
def draw_kernel(dtype: torch.dtype, threads: int = THREADS) -> Kernel:
    """The variant for logits of `dtype`."""
    logit = "float" if dtype == torch.float32 else "unsigned short"
    return Kernel(
        "draw.cu",
        "draw_tokens",
        parameters="(3Pi)",
        threads=threads,
        shared_bytes=8 * 2**_DIGIT_BITS + 12 * threads // 32,
        constants={
            "THREADS": threads,
            "SHARE_BITS": SHARE_BITS,
            "DIGIT_BITS": _DIGIT_BITS,
            "BFLOAT16": dtype == torch.bfloat16,
        },
        generated=f"using Logit = {logit};\n",
    )
