"""Results as people read them: Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
