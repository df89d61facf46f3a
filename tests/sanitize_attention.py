r"""A few small calls of one attention kernel, to be run under NVIDIA's checker on a machine with a GPU:

    compute-sanitizer --tool racecheck --kernel-name kns=decode \
        python tests/sanitize_attention.py decode|append|prefill|gather

The path is the kernels' name as well. memcheck takes `--report-api-errors no`, as it does for the GEMM
(`sanitize_gemm.py`), and here, too, each lane of a warp arrives at barriers for itself.

Exits with an error if a result is not the reference's, or if the checker finds something.
"""

from __future__ import annotations

import sys

import torch
from test_attention_gpu import check
from test_kv_append_gpu import append_on_both

from qserve.formats.kv import KVFormat
from qserve.kernels import prefill_sm90_cuda
from qserve.testing.launches import every_lane_arriving

F16, BF16 = torch.float16, torch.bfloat16
CASES = [
    (KVFormat(4, 128, 2), 8, F16, None),
    (KVFormat(4, 128, 1), 7, BF16, 100),
    (KVFormat(8, 128, 4), 4, F16, 100),
    (KVFormat(4, 64, 1), 12, F16, None),
    (KVFormat(8, 64, 3), 3, BF16, None),
]
"""Pages, query heads, type of q, window."""


def run_decode() -> None:
    """Ragged contexts over poisoned pages; one of them is split."""
    contexts = [1, 64, 65, 777, 2300]
    for kv_format, heads, dtype, window in CASES:
        check(kv_format, heads, contexts, [1] * len(contexts), 1e-3, dtype, window)


def run_prefill() -> None:
    """A prompt, two chunks behind cached tokens, and a decode step in one batch."""
    for kv_format, heads, dtype, window in CASES:
        limit = 2e-3 if dtype == F16 else 1e-2
        check(kv_format, heads, [300, 66, 1, 700], [300, 2, 1, 100], limit, dtype, window)


def run_gather() -> None:
    """The same on the path of devices older than Hopper, 16-bit pages as well."""
    prefill_sm90_cuda.serves = lambda inputs: False
    run_prefill()
    check(KVFormat(16, 64, 2), 4, [300, 66, 1], [30, 2, 1], 2e-3)


def run_append() -> None:
    """Every width of page with and without the Hadamard and the keys' center."""
    for kv_format, heads, dtype, _ in [*CASES, (KVFormat(16, 64, 2, BF16), 4, BF16, None)]:
        for transformed in (False, True):
            expected, found = append_on_both(kv_format, heads, dtype, transformed, transformed)
            assert transformed or torch.equal(found[0], expected[0])
            assert transformed or torch.equal(found[1], expected[1])


if __name__ == "__main__":
    path = sys.argv[1]
    runs = {
        "decode": run_decode,
        "append": run_append,
        "prefill": run_prefill,
        "gather": run_gather,
    }
    torch.manual_seed(0)
    with every_lane_arriving():
        runs[path]()
    print(f"{path}: done")
