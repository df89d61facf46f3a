"""Results as people read them: Markdown tables, and the files of a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from qserve.evaluation.compare import Comparison, Row
from qserve.evaluation.diff import LayerDiff, ModelDiff


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table whose columns align as plain text too: the first left, the others right."""
    columns = zip(header, *rows, strict=True)
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    yield line(header)
    yield line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    yield from map(line, rows)


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """A table of perplexities, smallest first, over the seeds of each recipe and format."""
    yield f"Perplexity over {comparison.tokens} tokens; with several seeds the mean, and from least"
    yield "to most. KL divergence and likeliest tokens: the checkpoint with its own formats against"
    yield "the original."
    yield ""
    header = (
        "recipe",
        "W",
        "group",
        "A",
        "KV",
        "perplexity",
        "over unquantized",
        "MB",
        "KL",
        "top-1",
    )
    groups = sorted(by_format(comparison.rows), key=lambda rows: _mean(rows, "perplexity"))
    size = f"{comparison.unquantized_bytes / 1e6:.1f}"
    first = ["unquantized", "16", "", "16", "16", f"{comparison.unquantized:.3f}", "", size, "", ""]
    yield from markdown_table(
        header, [first, *(_comparison_cells(rows, comparison) for rows in groups)]
    )


def by_format(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seeds alone, together."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.recipe, row.group_size, row.activation_bits, row.kv_bits)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _comparison_cells(rows: Sequence[Row], comparison: Comparison) -> list[str]:
    row, mean = rows[0], _mean(rows, "perplexity")
    values = [each.perplexity for each in rows]
    spread = f" ({min(values):.3f} - {max(values):.3f})" if len(rows) > 1 else ""
    return [
        row.recipe,
        str(row.weight_bits),
        "channel" if row.group_size == -1 else str(row.group_size),
        str(row.activation_bits),
        str(row.kv_bits),
        f"{mean:.3f}{spread}",
        f"{mean - comparison.unquantized:+.3f}",
        f"{row.bytes / 1e6:.1f}",
        f"{_mean(rows, 'kl_divergence'):.4f}",
        f"{_mean(rows, 'top1_agreement'):.2%}",
    ]


def _mean(rows: Sequence[Row], name: str) -> float:
    return fmean(getattr(row, name) for row in rows)


def write_comparison(comparison: Comparison, output: Path) -> None:
    """comparison.md, comparison.json and comparison.png in an existing folder."""
    from qserve.evaluation.plot import comparison_figure

    (output / "comparison.md").write_text("\n".join([*comparison_lines(comparison), ""]))
    (output / "comparison.json").write_text(json.dumps(asdict(comparison), indent=1))
    comparison_figure(comparison).savefig(output / "comparison.png", dpi=150)


def diff_lines(diff: ModelDiff) -> Iterator[str]:
    """A table of signal-to-noise ratios in decibel, a row per layer, and what they amount to."""
    linears = [part.rpartition(".")[2].removesuffix("_proj") for part in diff.layers[0].weights]
    header = ["layer", *linears, "attention", "mlp", "output", "cosine"]
    yield "Signal over noise in dB: weights; what attention and MLP add, given the original's input;"
    yield "the residual stream after the layer, with the errors of those before it, and its cosine."
    yield ""
    yield from markdown_table(
        header, [[str(index), *_cells(layer)] for index, layer in enumerate(diff.layers)]
    )
    yield ""
    yield (
        f"KL divergence {diff.kl_divergence:.5f} nats, same likeliest token {diff.top1_agreement:.2%}, "
        f"over {diff.tokens} tokens; residual stream {'' if diff.rotated else 'not '}rotated"
    )


def _cells(layer: LayerDiff) -> list[str]:
    agreements = (*layer.weights.values(), layer.attention, layer.mlp, layer.output)
    return [*(f"{each.sqnr_db:.1f}" for each in agreements), f"{layer.output.cosine:.5f}"]
