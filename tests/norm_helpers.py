"""What is asked of every GEMM that goes on with a norm."""

from __future__ import annotations

import torch

from qserve.formats.activation import QuantizedActivation
from qserve.kernels.gemm_cuda import CudaWeight


def assert_same(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    """Bit for bit."""
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name


def assert_ready(weight: CudaWeight) -> None:
    """What launches share is as the next one needs it."""
    turn, finished = weight.turns[:2].tolist()
    assert not weight.inbox.ne(-1).any(), "outputs are left"
    assert not weight.parts[turn].ne(-1).any(), "parts of rows are left"
    assert finished == 0
