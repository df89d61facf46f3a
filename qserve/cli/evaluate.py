"""Commands that measure a model's quality, on the code path that serves it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qserve.cli.model import console
from qserve.cli.options import GROUP_SIZES, Calibration, GroupSizeOption, KVBits, Model, bits_of
from qserve.config import ConfigError, EngineConfig

if TYPE_CHECKING:
    from qserve.evaluation.sequences import EvaluatedModel

evaluate = typer.Typer(help="Measure a model.", no_args_is_help=True)

ActivationBits = Annotated[
    Literal["8", "16"] | None,
    typer.Option("--activations", help="Bits of activations, instead of the checkpoint's own."),
]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda; auto: the GPU if there is one.")]
Text = Annotated[Path | None, typer.Option(help="A file of UTF-8 text.")]
Dataset = Annotated[
    str | None, typer.Option(help="wikitext2: its test split, from the hub or its cache.")
]
SeqLen = Annotated[int, typer.Option(help="Tokens of a window.")]
MaxWindows = Annotated[int | None, typer.Option(help="Windows at most.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@evaluate.command()
def perplexity(
    model: Model,
    text: Text = None,
    dataset: Dataset = None,
    seq_len: SeqLen = 2048,
    max_windows: MaxWindows = None,
    kv: KVBits = None,
    activations: ActivationBits = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Perplexity of a model, quantized or not, on a text or a data set."""
    content = _content(text, dataset)
    from qserve.evaluation.perplexity import measure_perplexity

    served = _load(model, kv, activations, device).model
    result = measure_perplexity(served, content, seq_len, max_windows, progress=not as_json)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.windows} "
            f"windows, {result.seconds:.1f} s"
        )


@evaluate.command()
def diff(
    original: Annotated[str, typer.Argument(help="The unquantized model.", show_default=False)],
    quantized: Annotated[str, typer.Argument(help="What was made of it.", show_default=False)],
    text: Text = None,
    dataset: Dataset = None,
    seq_len: SeqLen = 512,
    max_windows: MaxWindows = 4,
    kv: KVBits = None,
    activations: ActivationBits = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Where a quantized model departs from its original, layer by layer, in decibel."""
    content = _content(text, dataset)
    from qserve.evaluation.diff import diff_models
    from qserve.evaluation.report import diff_lines
    from qserve.evaluation.text import text_windows

    exact = _load(original, None, None, device)
    served = _load(quantized, kv, activations, device)
    windows = text_windows(exact.model.tokenizer, content, seq_len, max_windows)
    result = diff_models(exact, served, windows, progress=not as_json)
    print(json.dumps(result.to_json()) if as_json else "\n".join(diff_lines(result)))


@evaluate.command()
def compare(
    model: Model,
    recipes: Annotated[str, typer.Option(help="Separated by commas.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for all of it.")],
    text: Text = None,
    dataset: Dataset = None,
    seq_len: SeqLen = 2048,
    max_windows: MaxWindows = None,
    group_size: GroupSizeOption = "auto",
    calibration: Calibration = None,
    kv: Annotated[
        str | None, typer.Option("--kv", help="4, 8, 16, separated by commas; or each one's own.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="8, 16, separated by commas; or each recipe's own.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of calibration, separated by commas.")] = "0",
    device: Device = "auto",
) -> None:
    """Quantize by several recipes and measure each; goes on where it was stopped.

    Writes comparison.md, comparison.json and comparison.png beside the checkpoints.
    """
    _require_extra("matplotlib")
    content = _content(text, dataset)
    from qserve.evaluation.compare import Study
    from qserve.evaluation.compare import compare as run
    from qserve.evaluation.report import comparison_lines, write_comparison
    from qserve.models.source import open_source
    from qserve.quant.recipe import find_recipe

    study = Study(
        open_source(model),
        [find_recipe(name) for name in recipes.split(",")],
        content,
        window_length=seq_len,
        max_windows=max_windows,
        group_size=GROUP_SIZES[group_size],
        calibration=calibration,
        seeds=_integers("--seeds", seeds),
        kv_bits=_integers("--kv", kv) if kv else (None,),
        activation_bits=_integers("--activations", activations) if activations else (None,),
        device=device,
    )
    comparison = run(study, output, console)
    write_comparison(comparison, output)
    print("\n".join(comparison_lines(comparison)))


@evaluate.command()
def tasks(
    model: Model,
    names: Annotated[str, typer.Option("--tasks", help="Of lm-eval, separated by commas.")],
    include_path: Annotated[
        Path | None, typer.Option(help="A directory of further tasks, in lm-eval's YAML.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples shown, instead of a task's own number.", min=0)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples at most, for a try.", min=1)] = None,
    kv: KVBits = None,
    activations: ActivationBits = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Zero- and few-shot tasks of the lm-evaluation-harness."""
    _require_extra("lm_eval")
    from lm_eval.utils import make_table

    from qserve.evaluation.tasks import evaluate_tasks

    served = _load(model, kv, activations, device).model
    results = evaluate_tasks(served, names.split(","), include_path, num_fewshot, limit)
    print(json.dumps(results["results"]) if as_json else make_table(results))


def _load(model: str, kv: str | None, activations: str | None, device: str) -> EvaluatedModel:
    from qserve.evaluation.sequences import EvaluatedModel

    config = EngineConfig(kv_bits=bits_of(kv), activation_bits=bits_of(activations), device=device)
    return EvaluatedModel.open(model, config)


def _require_extra(module: str) -> None:
    """Raise ConfigError if a module of the extra `evaluation` is missing."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{module} is not installed: pip install 'qserve[evaluation]'")


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not integers separated by commas") from error


def _content(text: Path | None, dataset: str | None) -> str:
    """What `--text` or `--dataset` holds."""
    from qserve.evaluation.text import dataset_text, read_text

    if text is not None and dataset is None:
        return read_text(text)
    if dataset is not None and text is None:
        return dataset_text(dataset)
    raise ConfigError("give either --text or --dataset")
