"""Results of the accuracy study as Markdown tables: means over seeds, with their range."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def tables(results: list[Result]) -> str:
    """One table per section and model; of dithered ones with the share of the gap that is closed."""
    lines: list[str] = []
    for dither in dict.fromkeys(r["dither"] for r in results):
        model = [r for r in results if r["dither"] == dither]
        exact = _values([r for r in model if r["section"] == "unquantized"], "W")
        name = "Unquantized" if dither is None else f"Unquantized, dithered by seed {dither}"
        lines += [f"{name}: {_spread(exact)}", ""]
        for section in dict.fromkeys(r["section"] for r in model if "seed" in r):
            own = [r for r in model if r["section"] == section]
            lines += _table(section, own, None if dither is None else _mean(exact))
    return "\n".join(lines) + "\n"


def _table(section: str, results: list[Result], exact: float | None) -> list[str]:
    """exact: the unquantized model's perplexity, where the gap to it is to be compared."""
    formats = list(dict.fromkeys(name for r in results for name in r["perplexity"]))
    head = [section, *formats, *([] if exact is None else ["gap closed"]), "runs", "seconds"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in dict.fromkeys(r["name"] for r in _in_order(results)):
        own = [r for r in results if r["name"] == name]
        cells = [_spread(_values(own, each)) for each in formats]
        if exact is not None:
            cells.append(_closed(own, results, exact))
        seconds = sum(r["seconds"] for r in own) / len(own)
        lines.append(_line([name, *cells, str(len(own)), f"{seconds:.0f}"]))
    return [*lines, ""]


def _closed(own: list[Result], results: list[Result], exact: float) -> str:
    """Of the gap between rtn at the same group size and the unquantized model, in percent."""
    suffix = ", per channel" if own[0]["name"].endswith("per channel") else ""
    rounded = _mean(_values([r for r in results if r["name"] == "rtn" + suffix], "KV4"))
    return f"{100 * (rounded - _mean(_values(own, 'KV4'))) / (rounded - exact):.0f} %"


def _in_order(results: list[Result]) -> list[Result]:
    """By what their rows reach."""
    return sorted(
        results, key=lambda r: _mean(_values([s for s in results if s["name"] == r["name"]], "KV4"))
    )


def _values(results: Iterable[Result], column: str) -> list[float]:
    return [r["perplexity"][column] for r in results if column in r["perplexity"]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    if max(values) - min(values) < 0.005:
        return f"{_mean(values):.2f}"
    return f"{_mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables of JSON files that the study wrote, as of one."""
    parser = argparse.ArgumentParser(description="Print results of the accuracy study.")
    parser.add_argument("results", nargs="+", type=Path)
    results = [row for path in parser.parse_args().results for row in json.loads(path.read_text())]
    print(tables(results), end="")


if __name__ == "__main__":
    main()
