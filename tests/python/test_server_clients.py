"""The server as LangChain and llm see it, which people use more than OpenAI's own client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import mustafar
from support.paths import DEMO
from support.server import serving

QUESTIONS = ["What does textwrap.dedent do?", "What does os.walk do?", "What does zip do?"]


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, dtype="f32", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def url(model: mustafar.Model) -> Iterator[str]:
    with mustafar.Engine(model) as engine:
        with serving(engine) as (address, _):
            yield address + "/v1"


def own(model: mustafar.Model, *messages: tuple[str, str]) -> Any:
    """The library's own answer, as JSON."""
    said = [{"role": role, "content": content} for role, content in messages]
    return model.chat_completion(said, max_tokens=24, temperature=0)


def own_reply(model: mustafar.Model, *messages: tuple[str, str]) -> str:
    text: str = own(model, *messages)["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def langchain(url: str) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        base_url=url, api_key="any", model="demo", temperature=0, max_tokens=24, max_retries=0
    )


def test_langchain_replies(langchain: Any, model: mustafar.Model) -> None:
    message = langchain.invoke(QUESTIONS[0])
    answer = own(model, ("user", QUESTIONS[0]))
    assert message.content == answer["choices"][0]["message"]["content"]
    assert message.usage_metadata["input_tokens"] == answer["usage"]["prompt_tokens"]
    assert message.usage_metadata["output_tokens"] == answer["usage"]["completion_tokens"]
    conversation = [("user", QUESTIONS[0]), ("assistant", "It trims."), ("user", "What else?")]
    assert langchain.invoke(conversation).content == own_reply(model, *conversation)


def test_langchain_streams(langchain: Any, model: mustafar.Model) -> None:
    pieces = [chunk.content for chunk in langchain.stream(QUESTIONS[1])]
    assert len(list(filter(None, pieces))) > 1
    assert "".join(pieces) == own_reply(model, ("user", QUESTIONS[1]))


def test_langchain_asks_several_at_once(langchain: Any, model: mustafar.Model) -> None:
    replies = [message.content for message in langchain.batch(QUESTIONS)]
    assert replies == [own_reply(model, ("user", question)) for question in QUESTIONS]


def test_langchain_asks_for_an_object(langchain: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "title": "Answer",
        "type": "object",
        "properties": {"kind": {"enum": ["function", "class"]}, "sure": {"type": "boolean"}},
        "required": ["kind", "sure"],
        "additionalProperties": False,
    }
    asked = langchain.with_structured_output(schema, method="json_schema", strict=True)
    found = asked.invoke(QUESTIONS[0])
    assert found["kind"] in ("function", "class") and isinstance(found["sure"], bool)
    assert set(found) == {"kind", "sure"}


@pytest.mark.parametrize("how", [["--no-stream"], []])
def test_llm(url: str, model: mustafar.Model, tmp_path: Path, how: list[str]) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f'- model_id: mustafar\n  model_name: demo\n  api_base: "{url}"\n'
    )
    command = [sys.executable, "-m", "llm", "-m", "mustafar", "--no-log", *how]
    options = ["-o", "temperature", "0", "-o", "max_tokens", "24"]
    result = subprocess.run(
        [*command, *options, QUESTIONS[0]],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == own_reply(model, ("user", QUESTIONS[0])).rstrip("\n")
