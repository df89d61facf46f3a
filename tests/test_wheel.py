"""A built wheel carries everything: it is installed into a clean environment and compared."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; dependencies come from the running one."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = run("git", "ls-files", "qserve", "pyproject.toml", "README.md", "LICENSE", cwd=ROOT)
    for name in tracked.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, "./source", cwd=folder)
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (wheel,) = folder.glob("qserve-*.whl")
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=folder)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return site


def test_every_file_is_shipped(installed: Path) -> None:
    tracked = run("git", "ls-files", "qserve", cwd=ROOT).split()
    assert any(name.endswith(".cu") for name in tracked)
    for name in tracked:
        assert (installed / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_it_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    python = installed.parents[2] / "bin" / "python"
    code = "import qserve; print(qserve.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path)).is_relative_to(installed)
    (metadata,) = installed.glob("qserve-*.dist-info")
    version = run(python, "-m", "qserve", "--version", cwd=tmp_path).split()[-1]
    assert metadata.name == f"qserve-{version}.dist-info"
