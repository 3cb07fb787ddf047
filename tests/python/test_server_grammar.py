"""Replies over HTTP that follow a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
httpx2 = pytest.importorskip("httpx2")
jsonschema = pytest.importorskip("jsonschema")
openai = pytest.importorskip("openai")

import mustafar
from mustafar import grammar
from mustafar.server import Settings, service
from support.paths import DEMO
from support.schemas import PERSON
from support.server import serving, wait_for

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Who are you?"}]


def json_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def url(model: mustafar.Model) -> Iterator[str]:
    settings = Settings(max_grammar_bytes=4096)
    with mustafar.Engine(model) as engine, serving(engine, settings) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept(client: openai.OpenAI, model: mustafar.Model, stream: bool) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "temperature": 1.0, "seed": 3, "max_tokens": 200}
    body |= {"response_format": json_format(PERSON), "n": 2}
    own = model.chat_completion(**body)
    answer = client.chat.completions.create(model="demo", stream=stream, **body)
    if stream:
        texts, reasons = ["", ""], ["", ""]
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    else:
        texts = [choice.message.content for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
    assert reasons == ["stop", "stop"]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert texts == [choice["message"]["content"] for choice in own["choices"]]


def test_any_object(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            response_format={"type": "json_object"},
            seed=seed,
            temperature=0,
            max_tokens=100,
        )
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text.lstrip().startswith("{") and reason in ("stop", "length")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
    none = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format={"type": "text"}, max_tokens=3
    )
    assert none.choices[0].message.content


def test_models_of_pydantic(client: openai.OpenAI) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Answer(pydantic.BaseModel):
        word: str = pydantic.Field(max_length=5)
        right: bool

    parsed = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Answer, temperature=0, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_continued_texts_follow_one_too(client: openai.OpenAI) -> None:
    def complete(**extra: Any) -> str:
        return client.completions.create(
            model="demo", prompt="Well? ", max_tokens=60, temperature=0.9, seed=2, extra_body=extra
        ).choices[0].text  # fmt: skip

    assert re.fullmatch("(yes|no), [0-9]{3}", complete(regex="(yes|no), [0-9]{3}"))
    assert complete(grammar='start: "a" "b"') == "ab"
    jsonschema.validate(json.loads(complete(json_schema=PERSON)), PERSON)
    jsonschema.validate(json.loads(complete(response_format=json_format(PERSON))), PERSON)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": json_format({"type": "wibble"})}, "response_format", "wibble"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format", "x"),
        ({"response_format": json_format({"enum": ["a" * 5000]})}, "response_format", "4096"),
        ({"regex": "("}, "regex", "regex"),
        ({"regex": "a" * 5000}, "regex", "5000 bytes"),
        ({"grammar": "start: x"}, "grammar", "x"),
        ({"regex": "a", "response_format": json_format({})}, None, "both"),
    ],
)
def test_what_is_refused_is_named(
    url: str, body: dict[str, Any], param: str | None, said: str
) -> None:
    answer = httpx2.post(url + CHAT, json={"messages": MESSAGES, **body}, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"] and (param is None or error["param"] == param), error


def test_others_are_answered_while_a_grammar_is_compiled(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, compiling = threading.Event(), threading.Event()
    make = grammar._Compiler.make

    def wait(compiler: Any, name: str, text: str) -> Any:
        compiling.set()
        assert gate.wait(60)
        return make(compiler, name, text)

    known = {"prompt": "a", "regex": "abc", "max_tokens": 5}
    httpx2.post(url + TEXT, json=known, timeout=60)
    monkeypatch.setattr(grammar._Compiler, "make", wait)

    async def ask_all() -> list[str]:
        async with httpx2.AsyncClient(timeout=60) as client:

            async def ask(**body: Any) -> str:
                answer = await client.post(url + TEXT, json={"prompt": "a", **body})
                return str(answer.json()["choices"][0]["text"])

            new = asyncio.create_task(ask(regex="(ab){2}"))
            await asyncio.to_thread(compiling.wait, 60)
            assert (await client.get(url + "/health")).status_code == 200
            assert await ask(max_tokens=2)
            assert not new.done()
            gate.set()
            # One that was used lately needs no compiler.
            return [await new, await ask(regex="abc", max_tokens=5)]

    assert asyncio.run(ask_all()) == ["abab", "abc"]


def test_a_grammar_that_takes_too_long(
    model: mustafar.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    make = grammar._Compiler.make
    monkeypatch.setattr(service, "_COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(grammar._Compiler, "make", lambda *given: gate.wait(60) and make(*given))
    body = {"prompt": "a", "regex": "(xy){3}", "max_tokens": 20}
    with mustafar.Engine(model) as engine, serving(engine) as (url, app):
        late = httpx2.post(url + TEXT, json=body, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        assert late.json()["error"]["param"] == "regex"
        assert engine.stats().running + engine.stats().waiting == 0
        gate.set()
        wait_for(lambda: grammar._kept(model._core, "regex", "(xy){3}"))
        again = httpx2.post(url + TEXT, json=body, timeout=60)
        assert again.json()["choices"][0]["text"] == "xyxyxy"
