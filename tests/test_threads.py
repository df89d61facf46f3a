"""Small CPU steps run on one thread, large ones on all, and the setting is put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qserve.engine.threads import BOUND_BY_MEMORY, SHARED_WORK, StepThreads
from qserve.models.config import ModelConfig
from qserve.models.names import linear_shapes
from qserve.testing.tiny import tiny_config

CONFIG = ModelConfig.from_hf(tiny_config())
ENOUGH = SHARED_WORK // sum(n * k for n, k in linear_shapes(CONFIG).values()) + 1


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "tokens", "threads"),
    [("cpu", 1, 1), ("cpu", ENOUGH - 1, 1), ("cpu", ENOUGH, 2), ("cuda", 1, 2)],
)
def test_threads_by_work(device: str, tokens: int, threads: int) -> None:
    assert ENOUGH > BOUND_BY_MEMORY
    with StepThreads(CONFIG, torch.device(device)).for_tokens(tokens):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_the_setting_is_put_back_after_an_error() -> None:
    with pytest.raises(RuntimeError), StepThreads(CONFIG, torch.device("cpu")).for_tokens(1):
        raise RuntimeError
    assert torch.get_num_threads() == 2
