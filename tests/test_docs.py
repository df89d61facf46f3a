"""What README and docs/ name exists: links, commands and their options, scripts and theirs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from qserve.cli.commands import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def commands(name: str) -> list[list[str]]:
    """The words of each command of this name that a page shows: alone on a line, or between backticks."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", "")
    shown = re.findall(rf"(?:^ *|`){name} [^`\n]*", text, re.MULTILINE)
    return [shlex.split(re.sub(r"[\[\]`|]", " ", each), comments=True)[1:] for each in shown]


def test_commands_and_options_exist() -> None:
    shown = commands("qserve")
    assert len(shown) > 20
    for words in shown:
        command: Any = get_command(app)
        while words and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word for word in words if re.match(r"--?[a-z]", word)}
        assert used <= known, (command.name, used - known)


def test_scripts_and_options_exist() -> None:
    shown = commands("python")
    assert len(shown) > 5
    for script, *words in shown:
        if script != "-m":
            source = (ROOT / script).read_text()
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), script
