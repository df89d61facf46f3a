"""The page at `/`: what is served, and how it behaves in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from server_helpers import metric, refusal, serving, slow_engine, stub_engine, wait_until

from qserve.server.app import PAGE

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RATE = "document.getElementById('tokens-per-second').textContent"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def test_page_is_served_from_the_server_alone() -> None:
    with serving(stub_engine()) as http:
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"] == "default-src 'self'"
        names = set(re.findall(r'(?:href|src)="(page/[^"]+)"', page.text))
        imported = re.findall(r'from "\./([^"]+)"', (PAGE / "main.js").read_text())
        names |= {f"page/{name}" for name in imported}
        assert {f"page/{path.name}" for path in PAGE.iterdir()} == names | {"page/index.html"}
        for name in names:
            assert http.get(name).status_code == 200
        refusal(http.get("/page/nothing.js"), 404)
        refusal(http.get("/page/..%2fapp.py"), 404)


def test_nothing_is_loaded_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        addresses = set(re.findall(r"https?://[\w./]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: object, **options: Any) -> Iterator[Any]:
    """The page, open in a fresh profile; an error of its scripts or of its console is a failure."""
    errors: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if is_ours(line) else None)
    page.set_default_timeout(15_000)
    try:
        page.goto(str(url))
        yield page
    finally:
        context.close()
    assert errors == []


def is_ours(line: Any) -> bool:
    """Whether a line of the console is an error, other than that a request was refused."""
    return line.type == "error" and not line.text.startswith("Failed to load resource")


def wait_for(page: Any, condition: str) -> None:
    """Playwright's own way to wait for an expression is against the page's security policy."""
    wait_until(lambda: page.evaluate(condition))


@in_browser
def test_chat_by_keyboard(browser: Any) -> None:
    with serving(stub_engine()) as http, opened(browser, http.base_url) as page:
        page.get_by_text("stub", exact=True).wait_for()
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.fill("#max_tokens", "20")
        page.focus("#prompt")
        for text in ("<b>é</b>", "second"):
            page.keyboard.type(text)
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Send").wait_for()
        wait_for(page, "document.querySelectorAll('.timing').length === 2")
        said = page.locator(".message.user .text").all_inner_texts()
        assert said == ["<b>é</b>", "second"]
        answers = page.locator(".message.assistant .text").all_text_contents()
        assert [answer[:17] for answer in answers] == ["<|im_start|>user\n"] * 2
        assert "20 tokens" in page.locator(".timing").first.inner_text()
        page.get_by_role("button", name="New chat").press("Enter")
        assert page.locator(".message").count() == 0
        assert page.get_by_text("Say something").is_visible()


@in_browser
def test_history_and_settings_are_sent(browser: Any) -> None:
    with serving(stub_engine()) as http, opened(browser, http.base_url) as page:
        page.fill("#system", "be brief")
        page.fill("#max_tokens", "3")
        page.fill("#seed", "7")
        page.fill("#temperature", "1.5")
        bodies = []
        page.on("request", lambda asked: bodies.append(asked.post_data_json))
        for text in ("one", "two"):
            page.fill("#prompt", text)
            page.get_by_role("button", name="Send").click()
            page.get_by_role("button", name="Send").wait_for()
        first, second = [body for body in bodies if body]
        assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
        assert second["messages"][0]["content"] == "be brief"
        assert (first["max_tokens"], first["seed"], first["temperature"]) == (3, 7, 1.5)
        assert "top_k" not in first


@in_browser
def test_live_numbers_move_and_escape_stops(browser: Any) -> None:
    engine = slow_engine()
    with serving(engine) as http, opened(browser, http.base_url) as page:
        assert page.locator("#running").inner_text() == "0"
        page.fill("#max_tokens", "")
        page.fill("#prompt", "hello")
        page.keyboard.press("Enter")
        wait_for(page, "document.getElementById('running').textContent === '1'")
        wait_for(page, f"Number({RATE}) > 10")
        assert page.locator("#step-time").inner_text().endswith(" ms")
        assert re.fullmatch(r"[1-9]\d* / \d+", page.locator("#pages").inner_text())
        length = "document.querySelector('.busy .text').textContent.length"
        before = page.evaluate(length)
        wait_for(page, f"{length} > {before}")
        page.keyboard.press("Escape")
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)
        wait_for(page, "document.getElementById('running').textContent === '0'")
        assert page.get_by_role("button", name="Send").is_visible()


@in_browser
def test_errors_are_shown(browser: Any) -> None:
    with (
        serving(stub_engine(), api_keys=("secret",)) as http,
        opened(browser, http.base_url) as page,
    ):
        page.get_by_text("a valid API key is needed").wait_for()
        page.fill("#api-key", "secret")
        page.press("#api-key", "Tab")
        page.get_by_text("stub", exact=True).wait_for()
        page.fill("#prompt", "x" * 5000)
        page.press("#prompt", "Enter")
        page.locator(".message.error").get_by_text("tokens").wait_for()
        assert page.locator(".message.assistant").count() == 0


@in_browser
def test_light_and_dark(browser: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with serving(stub_engine()) as http:
        grounds = {}
        for scheme in ("light", "dark"):
            with opened(browser, http.base_url, color_scheme=scheme) as page:
                grounds[scheme] = page.evaluate(ground)
                page.get_by_role("button", name="Switch between light and dark").click()
                grounds[f"not {scheme}"] = page.evaluate(ground)
                page.reload()
                assert page.evaluate(ground) == grounds[f"not {scheme}"]
        assert grounds["light"] == grounds["not dark"] != grounds["dark"] == grounds["not light"]
