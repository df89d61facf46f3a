"""Draw what `qserve bench kernels --json` printed: a plot per model family.

    python benchmarks/plot_kernels.py RESULTS.json docs/images        # needs matplotlib

The four linears of a layer together, as a multiple of cuBLAS FP8's speed, over the batch size.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

LABELS = {
    "channel": "QServe W4A8 per channel",
    "group": "QServe W4A8 groups of 128",
    "w8a8": "QServe W8A8",
    "int8": "cuBLAS INT8",
    "bf16": "cuBLAS bfloat16",
}
BASELINE = "fp8"

Totals = dict[int, dict[str, float]]
"""Tokens -> kernel -> microseconds of a layer's linears."""


def layer_totals(rows: list[dict[str, Any]]) -> dict[str, Totals]:
    """By family."""
    totals: dict[str, Totals] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    for row in rows:
        for kernel, timing in row.get("times", {}).items():
            totals[row["family"]][row["tokens"]][kernel] += timing["median"]
    return totals


def draw(family: str, totals: Totals, device: str, path: Path) -> None:
    """One plot."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": family})
    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    tokens = sorted(totals)
    for kernel, label in LABELS.items():
        ratios = [totals[count][BASELINE] / totals[count][kernel] for count in tokens]
        axes.plot(tokens, ratios, marker="o", markersize=3, label=label)
    axes.axhline(1, color="black", linewidth=0.8, label="cuBLAS FP8, scales per row")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens], fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens", ylabel="times as fast as cuBLAS FP8")
    axes.set_title(f"Linears of a layer of {family}, {device}", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for family, totals in layer_totals(results["rows"]).items():
        draw(family, totals, results["device"], arguments.folder / f"kernels-{family}.svg")


if __name__ == "__main__":
    main()
