"""The command line. Heavy imports happen inside commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qserve.cli.commands import app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error the user can cause ends as one sentence on stderr and exit code 1."""
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _is_users(error):
            raise
        sys.exit(f"error: {_sentence(error)}")


def _is_users(error: Exception) -> bool:
    """Ours are all ValueErrors; the file system's and safetensors' are about the user's files."""
    return isinstance(error, (ValueError, OSError)) or type(error).__name__ == "SafetensorError"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
