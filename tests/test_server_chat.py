"""`qserve chat`: a conversation in the terminal with a server or with a model of its own."""

from __future__ import annotations

import io
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from server_helpers import metric, serving, slow_engine, stub_engine, wait_until

from qserve.cli import main
from qserve.cli.chat import ChatError, Message, converse, server_reply
from qserve.engine.llm import LLM
from qserve.engine.request import SamplingParams
from qserve.testing.tiny import save_tiny_model

Captured = pytest.CaptureFixture[str]


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: object) -> int | str | None:
    """The exit code of a chat in which `typed` is typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as exit_:
        main(["chat", *map(str, arguments)])
    return exit_.value.code


def printed(captured: Captured) -> list[str]:
    """The answers, which follow a prompt each."""
    return [part.strip() for part in captured.readouterr().out.split("> ") if part.strip()]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_with_a_server(monkeypatch: pytest.MonkeyPatch, capsys: Captured, suffix: str) -> None:
    with serving(stub_engine()) as http:
        url = str(http.base_url).rstrip("/") + suffix
        assert chat(monkeypatch, "hi\n\n", url, "--max-tokens", 8) == 0
    assert capsys.readouterr().out == "> <|im_start|>user\nhi\n> > \n"


def test_history_is_sent_and_forgotten() -> None:
    asked: list[list[Message]] = []

    def reply(messages: list[Message]) -> Generator[str, None, None]:
        asked.append(messages)
        if messages[-1]["content"] == "bad":
            raise ChatError("refused")
        yield from (f"answer {len(asked)}"[:4], f"answer {len(asked)}"[4:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("one\nbad\ntwo\n/new\nthree\n/exit\nnever\n"))
        converse(reply, "be brief")
    contents = [[message["content"] for message in messages] for messages in asked]
    assert contents == [
        ["be brief", "one"],
        ["be brief", "one", "answer 1", "bad"],
        ["be brief", "one", "answer 1", "two"],
        ["be brief", "three"],
    ]
    assert [message["role"] for message in asked[2]] == ["system", "user", "assistant", "user"]


def test_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    model = save_tiny_model(tmp_path / "model")
    options = ("--precision", "fp32", "--max-tokens", 8, "--temperature", 0, "--system", "x")
    assert chat(monkeypatch, "hello\nand\n", model, *options) == 0
    llm = LLM(model, dtype="float32", max_num_sequences=1)
    messages = [{"role": "system", "content": "x"}]
    expected = []
    for text in ("hello", "and"):
        messages.append({"role": "user", "content": text})
        answer = llm.chat(messages, SamplingParams(max_tokens=8, temperature=0))[0].text
        expected.append(answer)
        messages.append({"role": "assistant", "content": answer})
    assert capsys.readouterr().out == "".join(f"> {text}\n" for text in expected) + "> \n"


def test_control_c_stops_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    former = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    with serving(slow_engine()) as http:
        reply = server_reply(str(http.base_url), {})

        def interrupted(messages: list[Message]) -> Generator[str, None, None]:
            for index, piece in enumerate(reply(messages)):
                if index == 5:
                    signal.raise_signal(signal.SIGINT)
                yield piece

        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        converse(interrupted, None)
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)
    (answer,) = printed(capsys)  # of a text without an end
    assert answer.startswith("<|im_start|>user")
    assert signal.getsignal(signal.SIGINT) is former


def test_api_key(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    with serving(stub_engine(), api_keys=("secret",)) as http:
        monkeypatch.delenv("QSERVE_API_KEY", raising=False)
        assert "valid API key" in str(chat(monkeypatch, "hi\n", http.base_url))
        monkeypatch.setenv("QSERVE_API_KEY", "secret")
        assert chat(monkeypatch, "hi\n", http.base_url, "--max-tokens", 3) == 0


def test_refusal_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    with serving(stub_engine()) as http:
        typed = "x" * 5000 + "\nhi\n"
        assert chat(monkeypatch, typed, http.base_url, "--max-tokens", 3) == 0
    output = capsys.readouterr()
    assert "error: the prompt has" in output.err and "<|im_start|>us" in output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("http://127.0.0.1:9",), "cannot be reached"),
        (("http://[",), "cannot be reached"),
        (("http://127.0.0.1:9", "--kv", "4"), "--kv is for a model"),
        (("http://127.0.0.1:9", "--precision", "fp16"), "--precision is for a model"),
        (("http://127.0.0.1:9", "--temperature", "-1"), "temperature"),
        (("no-model-here/",), "no-model-here"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    code = chat(monkeypatch, "", *arguments)
    assert isinstance(code, str) and code.startswith("error: ") and message in code
