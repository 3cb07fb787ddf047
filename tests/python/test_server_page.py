"""The server's chat page in a browser, where Chromium and its driver are installed."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

import mustafar
from mustafar.server import Settings
from support.paths import DEMO
from support.server import GatedEngine, serving, wait_for

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed")

# How WebDriver names an element.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """A page in headless Chromium, by the WebDriver protocol."""

    def __init__(self, address: str) -> None:
        self._http = httpx2.Client(base_url=address, timeout=60)
        options = {"args": ARGUMENTS}
        capabilities = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        body = {"capabilities": {"alwaysMatch": capabilities}}
        self._session = self._ask("POST", "/session", body)["sessionId"]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def _do(self, what: str, body: Any = None, method: str = "POST") -> Any:
        return self._ask(method, f"/session/{self._session}/{what}", body)

    def open(self, url: str) -> None:
        self._do("url", {"url": url})

    def script(self, code: str) -> Any:
        return self._do("execute/sync", {"script": code, "args": []})

    def _element(self, name: str) -> str:
        found = self._do("element", {"using": "css selector", "value": f"#{name}"})
        return str(found[ELEMENT])

    def click(self, name: str) -> None:
        self._do(f"element/{self._element(name)}/click", {})

    def type(self, name: str, text: str) -> None:
        self._do(f"element/{self._element(name)}/value", {"text": text})

    def text(self, name: str) -> str:
        return str(self.script(f"return document.getElementById('{name}').textContent"))

    def messages(self) -> list[list[str]]:
        items = "[...document.querySelectorAll('#messages li')]"
        return list(self.script(f"return {items}.map((li) => [li.className, li.textContent])"))

    def running(self) -> bool:
        return not self.script("return document.getElementById('stop').disabled")

    def complaints(self) -> list[str]:
        logged = self._do("se/log", {"type": "browser"})
        return [entry["message"] for entry in logged]

    def close(self) -> None:
        self._ask("DELETE", f"/session/{self._session}")
        self._http.close()


@contextmanager
def browsing() -> Iterator[Browser]:
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        for line in driver.stdout:
            if "started successfully on port" in line:
                break
        port = line.rstrip(".\n").rpartition(" ")[2]
        browser = Browser(f"http://127.0.0.1:{port}")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as opened:
        yield opened


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, threads=1) as loaded:
        yield loaded


def test_a_conversation(model: mustafar.Model, browser: Browser) -> None:
    question = "What does <b>textwrap.dedent</b> do?"
    expected = model.chat_completion(
        [{"role": "user", "content": question}], max_tokens=20, temperature=0
    )
    assert isinstance(expected, dict)
    with mustafar.Engine(model) as engine, serving(engine) as (url, _):
        browser.open(url)
        wait_for(lambda: "KV cache" in browser.text("cache"))
        assert browser.text("model") == "demo"
        browser.script("document.querySelector('details').open = true")
        browser.type("temperature", "0")
        browser.type("max_tokens", "20")
        browser.type("text", question + "\n")  # Enter sends
        wait_for(lambda: len(browser.messages()) == 2 and not browser.running())
        answer = expected["choices"][0]["message"]["content"]
        assert browser.messages() == [["user", question], ["assistant", answer]]
        made = expected["usage"]["completion_tokens"]
        assert browser.text("status").startswith(f"{made} tokens, ")
        browser.click("again")
        wait_for(lambda: not browser.running())
        assert browser.messages()[-1] == ["assistant", answer]
        browser.click("clear")
        assert browser.messages() == []
        assert browser.complaints() == []


def test_stop(model: mustafar.Model, browser: Browser) -> None:
    with GatedEngine(model) as engine:
        engine.gate = threading.Event()
        try:
            with serving(engine) as (url, app):
                browser.open(url)
                browser.type("text", "Hello")
                browser.click("send")
                wait_for(lambda: len(browser.messages()) == 2 and browser.messages()[1][1])
                said = browser.messages()[1][1]
                browser.click("stop")
                wait_for(lambda: app.service.metrics.disconnects.values.get((), 0) == 1)
                engine.gate.set()
                wait_for(lambda: engine.stats().cancelled == 1)
                assert not browser.running()
                question, answer = browser.messages()
                assert question == ["user", "Hello"]
                assert answer[0] == "assistant" and answer[1].startswith(said)
        finally:
            engine.gate.set()


def test_a_key_and_errors(model: mustafar.Model, browser: Browser) -> None:
    settings = Settings(api_keys=("secret",), max_prompt_tokens=64)
    with mustafar.Engine(model) as engine, serving(engine, settings) as (url, _):
        browser.open(url)
        wait_for(lambda: "key" in browser.text("status"))
        browser.script("document.querySelector('details').open = true")
        browser.type("key", "secret")
        browser.type("text", "word " * 100)
        browser.click("send")
        wait_for(lambda: browser.messages()[-1][0] == "error")
        assert "at most 64" in browser.messages()[-1][1]
        assert "KV cache" in browser.text("cache")
