"""The house's import direction, its torch-free rooms, and an import that touches nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qserve

ROOT = Path(qserve.__file__).parent

MAY_IMPORT = {
    "config": set(),
    "formats": {"config"},
    "kernels": {"formats", "config"},
    "models": {"kernels", "formats", "config"},
    "quant": {"models", "kernels", "formats", "config"},
    "engine": {"models", "kernels", "formats", "config"},
    "evaluation": {"engine", "quant", "models", "kernels", "formats", "config"},
    "server": {"engine", "config"},
    "testing": {"models", "kernels", "formats", "config", "engine"},
    "benchmark": {"testing", "engine", "models", "kernels", "formats", "config"},
}
ANY_ROOM = {"cli", "__init__", "__main__", "demo"}
TORCH_FREE = ("engine/request.py", "engine/block_pool.py", "engine/scheduler.py", "config.py")


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ANY_ROOM:
        return
    ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("qserve.")}
    forbidden = ours - MAY_IMPORT[room] - {room}
    assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_scheduling_never_sees_a_tensor(name: str) -> None:
    assert not {m for m in imported_modules(ROOT / name) if m.split(".")[0] == "torch"}


def test_import_touches_neither_cuda_nor_the_network() -> None:
    program = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = refuse
import qserve
assert "cuda" not in {name.split(".")[0] for name in sys.modules}, "cuda"
torch = sys.modules.get("torch")
assert torch is None or not torch.cuda.is_initialized()
print(qserve.__version__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == qserve.__version__
