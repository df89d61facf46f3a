"""The benchmarks' own arithmetic, and that they drive an engine and a server as they say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from server_helpers import serving, stub_engine

from qserve.benchmark.breakdown import (
    Breakdown,
    PartTime,
    Span,
    last_steps,
    own_times,
    part_of,
)
from qserve.benchmark.dummy import DummySource, dummy_engine
from qserve.benchmark.kernels import Ceilings
from qserve.benchmark.roofline import REST, Roofline
from qserve.benchmark.sampling import SETTINGS, Setting, library_draw
from qserve.benchmark.serving import (
    Arrival,
    Objectives,
    bench_serving,
    percentiles,
    poisson_arrivals,
    read_trace,
)
from qserve.benchmark.throughput import bench_throughput
from qserve.cli import main
from qserve.config import EngineConfig
from qserve.formats.kv import KVFormat
from qserve.kernels import draw_tokens
from qserve.models.attention import DenseAttention
from qserve.models.config import ModelConfig, ModelError
from qserve.models.loader import load_decoder
from qserve.models.names import linear_shapes
from qserve.models.rope import rope_table
from qserve.testing.tiny import tiny_config, tiny_tokenizer

CONFIGS = Path(__file__).parent.parent / "benchmarks" / "configs"
PARAMETERS = {"llama-3-8b": 8.03e9, "llama-2-7b": 6.74e9, "qwen1.5-72b": 72.3e9}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[Any]:
    """The JSON lines that a benchmark prints."""
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments), "--json"])
    assert not exit_.value.code, exit_.value.code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments)])
    assert exit_.value.code
    return capsys.readouterr().err + str(exit_.value.code)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_models_that_are_measured_have_the_size_they_claim(name: str) -> None:
    source = DummySource.read(CONFIGS / name, 128)
    config = source.config
    linears = sum(n * k for n, k in linear_shapes(config).values()) * config.num_layers
    total = linears + 2 * config.vocab_size * config.hidden_size
    assert math.isclose(total, PARAMETERS[name], rel_tol=0.005)
    assert config.max_positions >= 1024 + 512


@pytest.mark.parametrize("group_size", [-1, 64])
def test_random_weights_keep_activations_of_unit_size(group_size: int) -> None:
    source = DummySource(tiny_config(hidden_size=1024, vocab_size=2000), group_size)
    decoder = load_decoder(source, torch.float32)
    seen: list[torch.Tensor] = []
    attend = DenseAttention(
        decoder.config,
        length=64,
        rope_table=rope_table(decoder.config, 64),
        observer=lambda _, *heads: seen.extend(x.std() for x in heads),
    )
    hidden = decoder.forward(torch.arange(64), attend)
    assert len(seen) == 6 and all(0.3 < value < 3 for value in seen)
    assert 0.3 < decoder.logits(hidden).std() < 3


def test_a_dummy_needs_a_config_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        DummySource.read(tmp_path, 128)


def test_throughput_counts_every_token_once(config: Path) -> None:
    engine = dummy_engine(config, -1, EngineConfig(max_num_sequences=3, max_model_len=90))
    result = bench_throughput(engine, 7, 70, 20)
    assert math.isclose(result.output_tokens_per_second * result.seconds, 7 * 20)
    assert math.isclose(result.total_tokens_per_second * result.seconds, 7 * 90)
    assert result.largest_batch == 3 and result.pages_used == 6
    assert 0 < result.prefill_share < 1
    assert result.decode_step_ms > 0 and result.steps >= 3 * 20
    assert math.isclose(result.decode_tokens_per_second * result.decode_step_ms, 3000)


def test_throughput_of_random_weights_needs_only_a_config(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--num-requests", 3, "--max-batch", 2, "--input-len", 5, "--output-len", 4)
    (row,) = command(
        capsys,
        *("throughput", "--config", config, "--dummy-weights", "--group-size", 64, *options),
    )
    assert (row["requests"], row["largest_batch"], row["output_len"]) == (3, 2, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("model", "--config", "config.json", "--dummy-weights"),
        ("--config", "config.json"),
        ("model", "--dummy-weights"),
    ],
    ids=str,
)
def test_throughput_is_of_a_model_or_of_dummy_weights(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert "--config with --dummy-weights" in refusal(capsys, "throughput", *arguments)


def test_kernels_that_overlap_are_counted_once() -> None:
    spans = [
        Span("late", 12.0, 15.0),
        Span("first", 0.0, 4.0),
        Span("waits for the first", 1.0, 6.0),
        Span("inside", 2.0, 5.0),
    ]
    times = own_times(spans)
    assert dict(times) == {
        "first": 4.0,
        "waits for the first": 2.0,
        "inside": 0.0,
        "late": 3.0,
    }


def test_a_step_lasts_from_one_drawing_of_tokens_to_the_next() -> None:
    """What holds up the first is no gap, and its kernels are those of no step."""
    first = [Span("copy", 0.0, 1.0), Span("gemm", 500.0, 504.0), Span("draw_tokens", 505.0, 507.0)]
    steps = [
        Span(name, start + 10 * index, start + 10 * index + length)
        for index in range(3)
        for name, start, length in (("copy", 508, 1), ("gemm", 510, 5), ("draw_tokens", 515, 2))
    ]
    spans = [*steps, *first, Span("copy", 538.0, 539.0)]
    assert last_steps(spans, 3) == (10, steps)
    assert last_steps(spans, 2) == (10, steps[3:])


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("w4a8_gemm_small", "GEMM"),
        ("decode_combine", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_traits<64, cutlass::half_t>>", "attention"),
        ("rope_append", "append"),
        ("silu_mul_quantize", "producers"),
        ("nvjet_sm90_hsh_256x8_64x6_2x1_v_bz_TNT", "lm_head"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::nat", REST),
    ],
)
def test_every_kernel_belongs_to_a_part(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_the_bottleneck_is_what_loses_most_against_its_roofline() -> None:
    parts = (PartTime("GEMM", 60.0, 55.0, 4), PartTime("attention", 30.0, 20.0, 2))
    breakdown = Breakdown(64, 1280, 100.0, 95.0, parts, gaps=10.0 - 1e-9)
    assert breakdown.bottleneck == "attention"
    assert replace(breakdown, gaps=11.0).bottleneck == "gaps"
    assert math.isclose(breakdown.accounted, 0.9)
    assert "next bottleneck: attention" in str(breakdown)


def test_the_roofline_is_bytes_or_operations_whichever_take_longer() -> None:
    model = ModelConfig.from_hf(json.loads((CONFIGS / "llama-3-8b/config.json").read_text()))
    ceilings = Ceilings(copy_bandwidth=4e12, tensor_rate=1e15)
    roofline = Roofline(model, KVFormat(4, 128, 8), -1, ceilings)
    weights = sum(n * k for n, k in linear_shapes(model).values())
    small, large = roofline.part_times(1, 1280), roofline.part_times(4096, 1280)
    assert math.isclose(small["GEMM"], 32 * weights / 2 / 4e6, rel_tol=0.01)
    assert math.isclose(large["GEMM"], 32 * 2 * 4096 * weights / 1e9)
    assert math.isclose(small["attention"], 32 * 1280 * 8 * 2 * (64 + 4) / 4e6)
    assert math.isclose(large["lm_head"], 2 * 4096 * 128256 * 4096 / 5e8)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_torch_draws_from_what_our_filters_leave(setting: Setting) -> None:
    rows, vocab = 20000, 100
    logits = (2 * torch.randn(1, vocab)).expand(rows, -1)
    ours = draw_tokens(logits, setting.draws(rows)).bincount(minlength=vocab) / rows
    theirs = library_draw(logits, setting).bincount(minlength=vocab) / rows
    assert (ours - theirs).abs().sum() < 0.08


def test_arrivals_are_poisson_and_the_seed_decides() -> None:
    arrivals = poisson_arrivals(4.0, 4000, 10, 20, seed=1)
    gaps = [b.at - a.at for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert math.isclose(mean, 0.25, rel_tol=0.05)
    assert math.isclose(variance, mean**2, rel_tol=0.15)
    assert arrivals == poisson_arrivals(4.0, 4000, 10, 20, seed=1)
    assert arrivals != poisson_arrivals(4.0, 4000, 10, 20, seed=2)
    with pytest.raises(ValueError, match="rate must be positive"):
        poisson_arrivals(0.0, 1, 1, 1, seed=0)


def test_a_trace_starts_with_its_earliest_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [(105.5, 7, 3), (103.0, 5, 2)]
    names = ("timestamp", "input_len", "output_len")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines))
    assert read_trace(path) == [Arrival(0.0, 5, 2), Arrival(2.5, 7, 3)]
    path.write_text(lines[0] + '\n{"timestamp": 1}')
    with pytest.raises(ValueError, match=r"trace\.jsonl:2"):
        read_trace(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no requests"):
        read_trace(path)


def test_percentiles_are_interpolated_milliseconds() -> None:
    assert percentiles(i / 1e3 for i in range(101)) == {
        "mean": pytest.approx(50),
        "p50": pytest.approx(50),
        "p90": pytest.approx(90),
        "p99": pytest.approx(99),
    }
    assert percentiles([]) == {}


def test_serving_measures_what_a_paced_engine_does() -> None:
    """Steps of 20 ms: no token can come sooner, and five of them take four steps."""
    arrivals = [Arrival(0.05 * i, 10, 5) for i in range(6)]
    with serving(stub_engine(step_seconds=0.02)) as http:
        report = bench_serving(str(http.base_url), arrivals, Objectives())
    assert (report.requests, report.failed, report.errors) == (6, 0, {})
    assert report.seconds > 0.25
    assert math.isclose(report.output_tokens_per_second, 6 * 5 / report.seconds, rel_tol=0.1)
    assert report.tpot_ms["p50"] >= 15 and report.itl_ms["p50"] >= 15
    assert report.latency_ms["p50"] >= report.ttft_ms["p50"] + 4 * 15
    assert report.goodput == report.requests_per_second


@pytest.mark.parametrize(
    "objectives", [Objectives(ttft_ms=1e-3), Objectives(tpot_ms=1e-3)], ids=str
)
def test_goodput_counts_what_met_the_objectives(objectives: Objectives) -> None:
    with serving(stub_engine(step_seconds=0.01)) as http:
        report = bench_serving(str(http.base_url), [Arrival(0, 4, 4)] * 3, objectives)
    assert report.goodput == 0 < report.requests_per_second


def test_the_same_seed_sends_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = stub_engine()
    prompts: list[list[int]] = []
    add: Callable[..., None] = engine.add_request

    def recording(request_id: str, prompt: list[int], params: Any) -> None:
        prompts.append(prompt)
        add(request_id, prompt, params)

    monkeypatch.setattr(engine, "add_request", recording)
    with serving(engine) as http:
        for seed in (1, 1, 2):
            bench_serving(str(http.base_url), [Arrival(0, 9, 2)] * 4, Objectives(), seed)
    first, again, other = (sorted(prompts[i : i + 4]) for i in (0, 4, 8))
    assert first == again != other
    assert all(len(prompt) == 9 for prompt in prompts)


def test_refused_requests_are_counted_and_named() -> None:
    arrivals = [Arrival(0, 10, 4), Arrival(0, 5000, 4), Arrival(0, 5000, 4)]
    with serving(stub_engine(tiny_tokenizer(), max_model_len=100)) as http:
        report = bench_serving(str(http.base_url), arrivals, Objectives())
    assert (report.requests, report.failed) == (3, 2)
    assert report.errors == {"status 400": 2}


def test_serving_reports_each_rate_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(stub_engine()) as http:
        options = ("--num-requests", 3, "--input-len", 4, "--output-len", 2)
        rows = command(capsys, "serving", f"{http.base_url}", "--rate", 50, "--rate", 100, *options)
    assert [(row["rate"], row["requests"], row["failed"]) for row in rows] == [
        (50.0, 3, 0),
        (100.0, 3, 0),
    ]


def test_serving_needs_a_server_and_one_kind_of_load(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:1"
    assert "is no OpenAI server" in refusal(capsys, "serving", url, "--rate", 1)
    assert "--rate or --trace" in refusal(capsys, "serving", url)
