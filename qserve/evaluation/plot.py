"""A comparison drawn: perplexity against bytes, and how the residual stream fares by layer."""

from __future__ import annotations

from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qserve.evaluation.compare import Comparison
from qserve.evaluation.report import by_format


def comparison_figure(comparison: Comparison) -> Figure:
    """Two panels; bars reach from the least to the most of a recipe's seeds."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    sizes, layers = figure.subplots(1, 2)
    _draw_sizes(sizes, comparison)
    _draw_layers(layers, comparison)
    return figure


def _draw_sizes(axes: Axes, comparison: Comparison) -> None:
    size = comparison.unquantized_bytes / 1e6
    axes.plot(size, comparison.unquantized, "k*", markersize=10, label="unquantized")
    for rows in by_format(comparison.rows):
        values = [row.perplexity for row in rows]
        mean, row = fmean(values), rows[0]
        spread = [[mean - min(values)], [max(values) - mean]]
        label = f"{row.recipe} A{row.activation_bits} KV{row.kv_bits}"
        axes.errorbar(row.bytes / 1e6, mean, yerr=spread, fmt="o", capsize=3, label=label)
    axes.set(xlabel="weights, MB", ylabel="perplexity")
    axes.legend(fontsize="small")


def _draw_layers(axes: Axes, comparison: Comparison) -> None:
    """One line for each recipe, of its first seed."""
    first = {(row.recipe, row.group_size): row for row in reversed(comparison.rows)}
    for (recipe, _), row in reversed(first.items()):
        axes.plot(row.output_sqnr_db, marker=".", label=recipe)
    axes.set(xlabel="layer", ylabel="signal over noise of the residual stream, dB")
    axes.legend(fontsize="small")
