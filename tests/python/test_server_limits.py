"""What the server does not let through, and requests that nobody waits for any more."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")

import mustafar
from mustafar.server import Settings
from support.paths import DEMO
from support.server import GatedEngine, serving, wait_for

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, threads=1) as loaded:
        yield loaded


@pytest.fixture
def gated(model: mustafar.Model) -> Iterator[GatedEngine]:
    """An engine of one request at once, which makes tokens when the gate is open."""
    with GatedEngine(model, max_batch=1, max_waiting=1) as engine:
        engine.gate = threading.Event()
        try:
            yield engine
        finally:
            engine.gate.set()


def code_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_keys(model: mustafar.Model) -> None:
    settings = Settings(api_keys=("first key", "zweiter-Schlüssel"))
    with mustafar.Engine(model) as engine, serving(engine, settings) as (url, _):
        for key in ("wrong", "first ke", "first key2", "first"):
            bad = httpx2.get(url + "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert code_of(bad) == (401, "invalid_api_key")
            assert bad.headers["www-authenticate"] == "Bearer"
        for route in ("/metrics", "/nowhere", "/v1/models/x"):
            assert httpx2.get(url + route).status_code == 401
        basic = httpx2.get(url + "/v1/models", headers={"Authorization": "Basic first key"})
        assert basic.status_code == 401
        for key in settings.api_keys:
            value = f"Bearer {key}".encode()
            good = httpx2.get(url + "/v1/models", headers={"Authorization": value})
            assert good.status_code == 200
        for route in ("/health", "/", "/page.js", "/page.css"):
            assert httpx2.get(url + route).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url + "/v1", api_key="no", max_retries=0).models.list()
        client = openai.OpenAI(base_url=url + "/v1", api_key="first key", max_retries=0)
        assert [listed.id for listed in client.models.list()] == ["demo"]


def test_bodies(model: mustafar.Model) -> None:
    kind = {"Content-Type": "application/json"}
    large = json.dumps({"prompt": "a" * 2000}).encode()
    with mustafar.Engine(model) as engine:
        with serving(engine, Settings(max_body_bytes=1000)) as (url, app):
            said = httpx2.post(url + "/tokenize", content=large, headers=kind)
            assert code_of(said) == (413, "body_too_large")
            # Without a Content-Length, in chunks.
            pieces = (large[i : i + 100] for i in range(0, len(large), 100))
            found = httpx2.post(url + "/tokenize", content=pieces, headers=kind)
            assert code_of(found) == (413, "body_too_large")
            assert app.service.metrics.refused.values[(("code", "body_too_large"),)] == 2
            small = httpx2.post(url + "/tokenize", json={"prompt": "a"})
            assert small.status_code == 200
            plain = httpx2.post(
                url + "/tokenize", content=b"{}", headers={"Content-Type": "text/plain"}
            )
            assert code_of(plain) == (415, "unsupported_media_type")


def test_hosts(model: mustafar.Model) -> None:
    settings = Settings(allowed_hosts=("localhost", "127.0.0.1", "[::1]"))
    with mustafar.Engine(model) as engine, serving(engine, settings) as (url, _):
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
            assert httpx2.get(url + "/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example:80", ""):
            answer = httpx2.get(url + "/health", headers={"Host": host})
            assert code_of(answer) == (403, "host_not_allowed")


def test_a_full_queue(gated: GatedEngine) -> None:
    with serving(gated, Settings(retry_after=3)) as (url, _):
        answers: list[Any] = []

        def ask() -> None:
            answers.append(httpx2.post(url + "/v1/completions", json=BODY, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        wait_for(lambda: gated.stats().running == 1)
        threads[1].start()
        wait_for(lambda: gated.stats().waiting == 1)
        for body in (BODY, {**BODY, "stream": True}):
            full = httpx2.post(url + "/v1/completions", json=body)
            assert code_of(full) == (429, "queue_full")
            assert full.headers["retry-after"] == "3"
            assert full.json()["error"]["type"] == "rate_limit_error"
        client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="demo", prompt="a")
        # Of several choices none is left behind where not all of them find a place.
        gated.gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        gated.gate.clear()
        many = httpx2.post(url + "/v1/completions", json={**BODY, "n": 4})
        assert many.status_code == 429
        gated.gate.set()
        wait_for(lambda: gated.stats().running + gated.stats().waiting == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_kv_budget_can_never_hold(stream: bool) -> None:
    messages = [{"role": "user", "content": "word " * 100}]
    requests = {
        "/v1/completions": ("prompt", {**BODY, "prompt": "word " * 100}),
        CHAT: ("messages", {"messages": messages, "max_tokens": 20}),
    }
    with mustafar.Model(DEMO, threads=1, kv_budget=20_000) as small:
        with mustafar.Engine(small) as engine, serving(engine) as (url, _):
            for route, (param, body) in requests.items():
                answer = httpx2.post(url + route, json={**body, "stream": stream}, timeout=60)
                assert code_of(answer) == (400, "kv_budget_exceeded")
                error = answer.json()["error"]
                assert error["type"] == "invalid_request_error" and error["param"] == param
                assert "bytes of KV cache, more than kv_budget = 20000" in error["message"]
            client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.BadRequestError, match="kv_budget = 20000"):
                client.chat.completions.create(model="demo", messages=messages, stream=stream)
            stats = engine.stats()
            assert (stats.failed, stats.running, stats.waiting) == (0, 0, 0)


def test_streams_at_once(gated: GatedEngine) -> None:
    body = {**BODY, "stream": True}
    with serving(gated, Settings(max_streams=1)) as (url, app):
        with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=60) as first:
            lines = first.iter_lines()
            assert next(lines).startswith("data: ")
            second = httpx2.post(url + "/v1/completions", json=body)
            assert code_of(second) == (429, "too_many_streams")
            gated.gate.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        bad = httpx2.post(url + "/v1/completions", json={**body, "n": 99})
        assert bad.status_code == 400  # and its place is free again
        again = httpx2.post(url + "/v1/completions", json=body, timeout=60)
        assert again.status_code == 200
        wait_for(lambda: not app.service._active)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_client_is_gone_is_cancelled(gated: GatedEngine, stream: bool) -> None:
    data = json.dumps({**BODY, "stream": stream}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with serving(gated) as (url, app):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + data)
            if stream:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            wait_for(lambda: gated.stats().running == 1)
        gone = app.service.metrics.disconnects.values
        wait_for(lambda: gone.get((), 0) == 1)
        gated.gate.set()
        wait_for(lambda: gated.stats().running == 0)
        stats = gated.stats()
        assert (stats.cancelled, stats.finished) == (1, 0)
        assert stats.generated_tokens < BODY["max_tokens"]
        after = httpx2.post(url + "/v1/completions", json=BODY, timeout=60)
        assert after.status_code == 200


def test_stopping_ends_what_runs_with_an_error(gated: GatedEngine) -> None:
    with serving(gated) as (url, app):
        body = {**BODY, "stream": True}
        with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            app.service.stop()
            gated.gate.set()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        refused = httpx2.post(url + "/v1/completions", json=BODY)
        assert code_of(refused) == (503, "shutting_down")
        assert httpx2.get(url + "/health").status_code == 503


def test_a_request_may_take_too_long(gated: GatedEngine) -> None:
    with serving(gated, Settings(timeout=0.05)) as (url, _):
        opener = threading.Timer(0.5, gated.gate.set)
        opener.start()
        late = httpx2.post(url + "/v1/completions", json={**BODY, "max_tokens": 1000}, timeout=60)
        opener.join()
        if late.status_code == 200:  # what was made by then
            assert late.json()["choices"][0]["finish_reason"] == "length"
            assert late.json()["usage"]["completion_tokens"] < 1000
        else:
            assert code_of(late) == (503, "timeout")


def test_the_log_has_no_prompts(
    model: mustafar.Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("DEBUG")
    with mustafar.Engine(model) as engine, serving(engine) as (url, app):
        secret = "Swordfish"
        for body in (
            {"prompt": secret, "max_tokens": 2},
            {"prompt": secret, "temperature": secret},
        ):
            httpx2.post(url + "/v1/completions?" + secret, json=body, timeout=60)
        httpx2.get(url + "/" + secret)

        def broken(*_: Any, **__: Any) -> None:
            raise KeyError(secret)

        monkeypatch.setattr(app.service, "submit", broken)
        failed = httpx2.post(url + "/v1/completions", json={"prompt": secret})
        assert code_of(failed) == (500, "internal_error")
        assert secret not in failed.text
    own = [record for record in caplog.records if record.name == "mustafar.server"]
    assert any("/v1/completions 200" in record.getMessage() for record in own)
    assert any("KeyError" in record.getMessage() for record in own)
    said = [r for r in caplog.records if r.name.partition(".")[0] in ("mustafar", "uvicorn")]
    assert secret not in "\n".join(record.getMessage() + str(record.exc_text) for record in said)


def test_the_page_has_no_foreign_resources(model: mustafar.Model) -> None:
    with mustafar.Engine(model) as engine, serving(engine) as (url, _):
        page = httpx2.get(url + "/")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        for route in ("/", "/page.js", "/page.css"):
            assert "//" not in httpx2.get(url + route).text.replace("// ", "")
