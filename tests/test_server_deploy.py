"""The files in deploy/ speak of what exists: metrics, commands and their options."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

from server_helpers import serving, stub_engine
from typer.main import get_command

from qserve.cli.commands import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def options_of_serve() -> set[str]:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    return {name for parameter in commands["serve"].params for name in parameter.opts}


def test_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "qserve.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"(?:vllm|qserve):\w+", query)}
    with serving(stub_engine()) as http:
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        served = set(re.findall(r"^([\w:]+)\{", http.get("/metrics").text, re.MULTILINE))
    assert asked <= served
    own = {n for n in served if ":" in n and not n.endswith(("_created", "_sum", "_count"))}
    assert own - asked == {"qserve:kv_cache_pages"}


def test_panels_are_numbered_and_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana" / "qserve.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places) and max(places)[0] < 24


def test_unit_runs_a_command_that_exists() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "qserve.service")
    command = shlex.split(unit["Service"]["ExecStart"])
    assert command[0].endswith("/bin/qserve") and command[1] == "serve"
    assert {part for part in command if part.startswith("--")} <= options_of_serve()
    assert unit["Service"]["KillSignal"] == "SIGTERM"


def test_image_runs_a_command_that_exists_from_files_that_exist() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    (entry,) = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("ENTRY")]
    assert entry[:2] == ["qserve", "serve"]
    assert {part for part in entry if part.startswith("--")} <= options_of_serve()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == {Path(n).name for n in copied}
