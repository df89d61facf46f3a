"""`qserve serve`: its options reach the server, and its mistakes end before a model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qserve.cli import main
from qserve.config import ServerConfig
from qserve.server.async_engine import AsyncEngine


def serve(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "model", "--port", "0", *map(str, arguments)])
    return exit_.value.code


def test_every_option_reaches_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Any, ...]] = []
    engine = SimpleNamespace(tokenizer="tokenizer", stats=None)
    monkeypatch.setattr("qserve.cli.serving.load_engine", lambda *_: engine)
    monkeypatch.setattr("qserve.cli.serving.run_server", lambda *given: served.append(given))
    monkeypatch.setattr("qserve.cli.serving.check_tls", lambda _: None)
    monkeypatch.delenv("QSERVE_API_KEY", raising=False)
    (tmp_path / "keys").write_text("key")
    options = (
        *("--max-requests", 7, "--max-body-bytes", 8, "--request-timeout", 1.5),
        *("--api-key-file", tmp_path / "keys", "--cors-origin", "a", "--cors-origin", "b"),
        *("--tls-certificate", "c.pem", "--tls-key", "k.pem", "--log-requests"),
    )
    assert serve(*options) == 0 and serve() == 0
    assert isinstance(served[0][0], AsyncEngine) and served[0][1:3] == ("tokenizer", "model")
    assert served[0][4] == ServerConfig(
        port=0,
        max_requests=7,
        max_body_bytes=8,
        request_timeout=1.5,
        api_keys=("key",),
        cors_origins=("a", "b"),
        tls_certificate=Path("c.pem"),
        tls_key=Path("k.pem"),
        log_requests=True,
    )
    assert served[1][4] == ServerConfig(port=0)


def test_mistakes_end_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qserve.cli.serving.load_engine", lambda *_: sys.exit("loaded"))
    file = tmp_path / "file"
    file.write_text("no certificate")
    for options, message in (
        (("--request-timeout", 0), "request_timeout"),
        (("--api-key-file", tmp_path / "nothing"), "nothing: No such file"),
        (("--tls-key", file), "tls_certificate and tls_key"),
        (("--tls-key", file, "--tls-certificate", file), "no certificate with its key"),
        (("--tls-key", file, "--tls-certificate", tmp_path / "none"), "No such file"),
    ):
        code = serve(*options)
        assert isinstance(code, str) and code.startswith("error: ") and message in code
    assert serve() == "loaded"


def test_replicas_need_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qserve.cli.serving.load_engine", lambda *_: sys.exit("loaded"))
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("qserve.server.replicas", "qserve.server.prefix_router"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code = serve("--replicas", 2)
    assert isinstance(code, str) and "qserve[replicas]" in code
