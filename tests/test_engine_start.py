"""An engine fits its memory before the first request, or says what to lower."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_helpers import PLAIN, make_engine, run_one, tiny_decoder

from qserve import SamplingParams
from qserve.config import ConfigError, EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.kv_cache import kv_format_of
from qserve.models.decoder import Decoder
from qserve.testing.tiny import tiny_config, tiny_source


def test_the_cache_fits_the_memory_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 2 * kv_format_of(tiny_decoder(), 4).page_bytes
    monkeypatch.setattr("qserve.engine.kv_cache.free_bytes", lambda device: 10 * page_bytes)
    engine = make_engine(num_pages=None, gpu_memory_utilization=0.75)
    assert engine.stats.pages_total == 7
    assert make_engine(num_pages=None, max_num_sequences=1, max_model_len=65).stats.pages_total == 2
    with pytest.raises(ConfigError, match="a page of the cache takes"):
        make_engine(num_pages=None, gpu_memory_utilization=0.05)
    tried = []

    def peak_bytes(step: Callable[[], None]) -> int:
        tried.append(step())
        return page_bytes

    policy = replace(PLAIN, peak_bytes=peak_bytes)
    assert make_engine(policy, num_pages=None).stats.pages_total == 9 - len(tried) == 7
    with pytest.raises(ConfigError, match="max_model_len 1000"):
        make_engine(max_model_len=1000)


def test_the_largest_steps_are_tried_before_the_cache_is_sized() -> None:
    shapes = []

    def prepare(steps: Iterable[Callable[[], object]]) -> None:
        *outputs, drawn = [step() for step in steps]
        assert [len(tokens) for tokens in drawn] == [1, 1]  # type: ignore[attr-defined]
        shapes.extend(len(output.hidden) for output in outputs)  # type: ignore[attr-defined]

    limits = {"max_num_sequences": 20, "max_batched_tokens": 200, "max_model_len": 150}
    make_engine(replace(PLAIN, prepare=prepare), **limits)
    assert shapes == [1, 2, 4, 8, 16, 20, 16, 32, 64, 128, 187, 20]


@pytest.mark.parametrize("device", ["gpu", "cuda:1"])
def test_a_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        Engine.from_source(tiny_source(tiny_config()), EngineConfig(device=device))


def test_weights_that_do_not_fit_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Decoder:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qserve.engine.loading.load_decoder", fail)
    with pytest.raises(ConfigError, match="weights do not fit cpu"):
        Engine.from_source(tiny_source(tiny_config()), EngineConfig())


def test_a_step_that_does_not_fit_is_one_error_at_the_start() -> None:
    def peak_bytes(step: Callable[[], None]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="lower max_batched_tokens"):
        make_engine(replace(PLAIN, peak_bytes=peak_bytes), num_pages=None)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_bits": 5},
        {"num_pages": 0},
        {"max_batched_tokens": 3, "max_num_sequences": 4},
        {"gpu_memory_utilization": 1.5},
        {"dtype": "float64"},
        {"max_model_len": "long"},
        {"max_model_len": 1},
    ],
    ids=str,
)
def test_a_bad_setting_is_one_error_that_names_it(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineConfig(**settings)


def test_collections_of_garbage_pass_over_what_is_loaded() -> None:
    """They would stall every so many steps; and what is let go must not need them."""
    gc.unfreeze()
    engine = Engine.from_source(tiny_source(tiny_config()), EngineConfig(num_pages=4))
    assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    run_one(engine, [1, 2, 3], SamplingParams(max_tokens=3))
    pools = weakref.ref(engine._runner._pools)
    gc.disable()
    try:
        del engine
        assert pools() is None
    finally:
        gc.enable()


def test_more_pages_than_the_memory_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_pages \d+ take \d+ bytes, but only \d+ are free"):
        make_engine(num_pages=1 << 40)
