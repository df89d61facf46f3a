"""The command line. Heavy imports happen inside commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qserve.cli.commands import app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error the user can cause ends as one sentence on stderr and exit code 1."""
    # Threads that spin for work steal the core their peer needs as soon as anything else runs: one
    # busy neighbour on two cores makes decoding seven times slower. torch reads this when imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _is_users(error):
            raise
        sys.exit(f"error: {_sentence(error)}")


def _is_users(error: Exception) -> bool:
    """Ours are ValueErrors, or name a kernel; the system's and safetensors' are about files."""
    by_name = type(error).__name__ in ("SafetensorError", "KernelError")
    return by_name or isinstance(error, (ValueError, OSError))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
