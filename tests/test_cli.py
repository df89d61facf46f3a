"""The command line: what it prints, and that every mistake ends in one sentence and an exit code."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import torch

import qserve
from qserve.cli import main
from qserve.cli.model import cache_directory
from qserve.config import EngineConfig
from qserve.engine.llm import LLM
from qserve.engine.loading import load_model
from qserve.engine.request import SamplingParams
from qserve.evaluation.perplexity import measure_perplexity
from qserve.formats.checkpoint import QuantizationConfig
from qserve.models.source import open_source
from qserve.testing.tiny import save_tiny_model, tiny_config

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Some text that is scored token by token. " * 10)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    if isinstance(exit_.value.code, str):
        print(exit_.value.code, file=sys.stderr)
        return 1
    return exit_.value.code or 0


def error_of(captured: Captured, *arguments: object) -> str:
    """The one sentence that a failing command says."""
    assert run(*arguments) == 1
    output = captured.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_version(capsys: Captured) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"qserve {qserve.__version__}\n"


def test_help_needs_no_torch() -> None:
    program = "import sys, qserve.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Quantize.


def test_quantize_and_evaluate(capsys: Captured, tmp_path: Path, model: Path, text: Path) -> None:
    output = tmp_path / "checkpoint"
    assert run("quantize", model, "-o", output, "--group-size", 64) == 0
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["wbits"], config["group_size"]) == ("qoq", 4, 64)
    capsys.readouterr()
    arguments = ("--text", text, "--seq-len", 50, "--json")
    results = []
    for path in (model, output):
        assert run("evaluate", "perplexity", path, *arguments) == 0
        results.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert 1e-4 < abs(results[1] / results[0] - 1) < 0.5


def test_quantize_replaces_nothing_but_checkpoints(
    capsys: Captured, tmp_path: Path, model: Path
) -> None:
    (tmp_path / "homework.txt").write_text("essay")
    for output in (tmp_path, tmp_path / "homework.txt"):
        assert "not a checkpoint of ours" in error_of(capsys, "quantize", model, "-o", output)
    other = save_tiny_model(tmp_path / "other")
    assert "not a checkpoint of ours" in error_of(capsys, "quantize", model, "-o", other)
    assert "holds the model itself" in error_of(capsys, "quantize", model, "-o", model)
    assert (tmp_path / "homework.txt").read_text() == "essay"
    assert (model / "model.safetensors").is_file() and (other / "model.safetensors").is_file()


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "checkpoint"
    output.mkdir()
    old = json.dumps({"quantization_config": QuantizationConfig().to_json()})
    (output / "config.json").write_text(old)
    program = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (60_000, 60_000))"
    program += "; from qserve.cli import main; main()"
    command = [sys.executable, "-c", program, "quantize", str(model), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert (output / "config.json").read_text() == old


# Generate.


def test_generate_as_it_is(capsys: Captured, model: Path) -> None:
    llm = LLM(model, dtype="float32", max_num_sequences=1)
    expected = llm.generate("hello", SamplingParams(max_tokens=12, temperature=0))[0].text
    arguments = ("--prompt", "hello", "--precision", "fp32", "--max-tokens", 12)
    assert run("generate", model, *arguments) == 0
    assert capsys.readouterr() == (expected + "\n", "")


def test_kv_bits_override(capsys: Captured, model: Path) -> None:
    arguments = ("generate", model, "--prompt", "hello", "--precision", "fp32")
    texts = set()
    for bits in (4, 16):
        assert run(*arguments, "--kv", bits) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 2


def test_unquantized_model_is_quantized_once(capsys: Captured, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "own")
    outputs = []
    for _ in range(2):
        assert run("generate", model, "--prompt", "hello", "--max-tokens", 5) == 0
        outputs.append(capsys.readouterr())
    assert "quantizing it once" in outputs[0].err
    assert "quantizing" not in outputs[1].err and "using" in outputs[1].err
    assert outputs[0].out == outputs[1].out
    (copy,) = cache_directory().iterdir()
    assert str(copy) in outputs[1].err
    save_tiny_model(tmp_path / "own", seed=1)
    assert run("generate", model, "--prompt", "hello", "--max-tokens", 5) == 0
    assert "quantizing it once" in capsys.readouterr().err


# Evaluate.


def test_perplexity_as_json(capsys: Captured, model: Path, text: Path) -> None:
    sizes = ("--seq-len", 50, "--max-windows", 3)
    assert run("evaluate", "perplexity", model, "--text", text, *sizes, "--json") == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert output.err == "" and result["tokens"] == 147 and result["seconds"] > 0
    loaded = load_model(open_source(str(model)), EngineConfig())
    expected = measure_perplexity(loaded, text.read_text(), 50, 3)
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)


def test_perplexity_in_words(capsys: Captured, model: Path, text: Path) -> None:
    assert run("evaluate", "perplexity", model, "--text", text, "--seq-len", 50) == 0
    assert "over 392 tokens in 8 windows" in capsys.readouterr().out


def test_diff(capsys: Captured, tmp_path: Path, model: Path, text: Path) -> None:
    output = tmp_path / "checkpoint"
    assert run("quantize", model, "-o", output, "--recipe", "rtn") == 0
    capsys.readouterr()
    arguments = ("evaluate", "diff", model, output, "--text", text, "--seq-len", 50)
    assert run(*arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 200 and 0 < result["kl_divergence"] < 1 and not result["rotated"]
    first = result["layers"][0]
    assert 10 < first["weights"]["mlp.up_proj"]["sqnr_db"] < 40 and first["mlp"]["cosine"] > 0.5
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    header = "| layer | q | k | v | o | gate | up | down | attention | mlp | output | cosine |"
    assert any(line.replace(" ", "") == header.replace(" ", "") for line in lines)
    (row,) = (line for line in lines if line.startswith("| 1 "))
    assert f"{result['layers'][1]['output']['sqnr_db']:.1f} |" in row
    assert "over 200 tokens; residual stream not rotated" in lines[-1]


def test_text_is_named_once(capsys: Captured, model: Path, text: Path) -> None:
    evaluate = ("evaluate", "perplexity", model)
    assert "give either --text or --dataset" in error_of(capsys, *evaluate)
    both = ("--text", text, "--dataset", "wikitext2")
    assert "give either --text or --dataset" in error_of(capsys, *evaluate, *both)


# Mistakes.


def unsupported(directory: Path) -> Path:
    save_tiny_model(directory)
    config = {**tiny_config(), "architectures": ["GPT2LMHeadModel"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def truncated(directory: Path) -> Path:
    weights = save_tiny_model(directory) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return directory


def empty(directory: Path) -> Path:
    directory.mkdir()
    return directory


def without_tokenizer(directory: Path) -> Path:
    for path in save_tiny_model(directory).glob("tokenizer*"):
        path.unlink()
    return directory


def no_gguf(directory: Path) -> Path:
    path = directory.with_suffix(".gguf")
    path.write_bytes(b"GGUF" + b"\0" * 100)
    return path


BROKEN: list[tuple[Callable[[Path], Path], str]] = [
    (lambda path: path, "no such directory or file"),
    (empty, "broken/config.json: No such file or directory"),
    (unsupported, "GPT2LMHeadModel"),
    (truncated, "model.safetensors"),
    (without_tokenizer, "tokenizer"),
    (no_gguf, "not a whole GGUF file"),
    (lambda path: path.with_suffix(".gguf"), "broken.gguf: No such file or directory"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
@pytest.mark.parametrize("precision", [(), ("--precision", "fp32")], ids=["quantized", "as it is"])
def test_broken_model(
    capsys: Captured,
    tmp_path: Path,
    broken: Callable[[Path], Path],
    message: str,
    precision: tuple[str, ...],
) -> None:
    model = broken(tmp_path / "broken")
    assert run("generate", model, "--prompt", "x", *precision) == 1
    output = capsys.readouterr()
    assert output.out == "" and message in output.err.splitlines()[-1]
    assert "Traceback" not in output.err


def test_bad_texts(capsys: Captured, model: Path, tmp_path: Path) -> None:
    evaluate = ("evaluate", "perplexity", model, "--text")
    assert "nowhere.txt: No such file" in error_of(capsys, *evaluate, tmp_path / "nowhere.txt")
    assert "Is a directory" in error_of(capsys, *evaluate, tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff")
    assert "not UTF-8 text: invalid start byte at byte 3" in error_of(
        capsys, *evaluate, tmp_path / "bytes.txt"
    )
    (tmp_path / "short.txt").write_text("abc")
    assert "less than one window" in error_of(capsys, *evaluate, tmp_path / "short.txt")


def test_bad_values(capsys: Captured, model: Path) -> None:
    generate = ("generate", model, "--precision", "fp32", "--prompt")
    assert "max_tokens" in error_of(capsys, *generate, "x", "--max-tokens", 0)
    assert "temperature" in error_of(capsys, *generate, "x", "--temperature", -1)
    assert "prompt is empty" in error_of(capsys, *generate, "")
    assert "513 tokens" in error_of(capsys, *generate, "x" * 513)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so(capsys: Captured, model: Path, text: Path) -> None:
    for arguments in (
        ("bench", "kernels"),
        ("bench", "attention"),
        ("bench", "sampling"),
        ("evaluate", "perplexity", model, "--text", text, "--device", "cuda"),
    ):
        assert "error: device 'cuda': PyTorch finds no GPU" in error_of(capsys, *arguments)


def test_bad_options(capsys: Captured, model: Path) -> None:
    for arguments in (
        ("generate", model, "--prompt", "x", "--kv", 5),
        ("generate", model, "--prompt", "x", "--precision", "fp8"),
        ("generate", model),
        ("generate", model, "--prompt", "x", "--speed", "fast"),
        ("serve", model, "--port", "many"),
        ("nonsense",),
    ):
        assert run(*arguments) == 2
        output = capsys.readouterr()
        assert output.out == "" and "Error: " in output.err.splitlines()[-1]


def test_precision_of_a_quantized_model(capsys: Captured, model: Path) -> None:
    assert run("generate", model, "--prompt", "x", "--max-tokens", 1) == 0
    (copy,) = cache_directory().iterdir()
    capsys.readouterr()
    error = error_of(capsys, "generate", copy, "--prompt", "x", "--precision", "fp16")
    assert "is quantized" in error


# Serve.


def test_address_that_cannot_be_had(capsys: Captured, model: Path) -> None:
    """Said before the model is loaded, so a model that does not exist makes no difference."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = error_of(capsys, "serve", "no-model", "--port", port)
    assert f"127.0.0.1 port {port}: Address already in use" in error
    assert "port must lie in" in error_of(capsys, "serve", model, "--port", 70000)


def test_serve_answers_until_it_is_told_to_end(model: Path) -> None:
    command = [sys.executable, "-m", "qserve", "serve", str(model)]
    options = ["--port", "0", "--precision", "fp32"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        banner = process.stderr.readline().split()
        assert banner[:3] == ["serving", "tiny", "at"]
        client = openai.OpenAI(base_url=banner[3], api_key="none", max_retries=5)
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0)
        llm = LLM(model, dtype="float32", max_num_sequences=1)
        expected = llm.generate("x", SamplingParams(max_tokens=3, temperature=0))[0].text
        assert answer.choices[0].text == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
