"""What a server computes once for conversations that begin alike, and what its answers say of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")

import mustafar
from mustafar import Engine, KVConfig, Session
from mustafar.server import Settings
from mustafar.server.service import ChatPrompts
from support.paths import DEMO
from support.server import serving

KV = KVConfig(sparsity=0.5, value_dtype="auto")
SYSTEM = {"role": "system", "content": "You answer questions about Python's library. " * 8}
QUESTIONS = ["What does textwrap.dedent do?", "What is a deque?", "Where is lru_cache?"]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
]
# The demo's own says nothing of tools.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end_of_turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, dtype="f32", threads=1) as loaded:
        yield loaded


def messages(question: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}]


def test_a_system_message_is_computed_once(model: mustafar.Model) -> None:
    with Engine(model, KV) as engine:
        n = shared(engine)
        with serving(engine, Settings(system_prefix=True)) as (url, _):
            with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
                answers = [
                    client.chat.completions.create(
                        model="demo",
                        messages=messages(question),
                        max_tokens=8,
                        temperature=0,
                    )
                    for question in QUESTIONS
                ]
                cached = [each.usage.prompt_tokens_details.cached_tokens for each in answers]
                assert cached == [0, n, n]
                chunks = list(
                    client.chat.completions.create(
                        model="demo",
                        messages=messages(QUESTIONS[0]),
                        max_tokens=8,
                        temperature=0,
                        n=2,
                        stream=True,
                        stream_options={"include_usage": True},
                    )
                )
                assert chunks[-1].usage.prompt_tokens_details.cached_tokens == n
            page = httpx2.get(url + "/metrics").text
            # The last choice may have had the whole prompt from the one before it.
            reused = int(page.split("\nmustafar_reused_tokens_total ")[1].split("\n")[0])
            assert reused >= 4 * n
            assert "mustafar_prefixes 1\n" in page and "mustafar_prefix_bytes " in page
        ids = ChatPrompts(engine, None).ids(messages(QUESTIONS[1]), None, False)
        session = Session(model, KV)
        session.prefill(ids[:n])
        expected = session.generate(ids[n:], max_new_tokens=8, temperature=0)
        assert answers[1].choices[0].message.content == expected.text


def shared(engine: Engine) -> int:
    """Tokens that conversations with the system message begin with, whatever is asked."""
    prompts = ChatPrompts(engine, None)
    one, other = (prompts.ids(messages(question), None, False) for question in ("A", "z"))
    return next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)


def test_what_comes_before_the_users_words(model: mustafar.Model, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    with Engine(model, KV) as engine:
        prompts = ChatPrompts(engine, str(template))

        def beginning(given: list[dict[str, str]], tools: Any = None) -> int:
            return prompts.beginning(prompts.ids(given, tools, False), given, tools)

        n = beginning(messages(QUESTIONS[0]))
        assert n == beginning(messages(QUESTIONS[1])) > 50
        assert beginning([*messages(QUESTIONS[0]), SYSTEM, messages("More")[1]]) == n
        assert beginning(messages("")[1:]) == 0  # neither a system message nor tools
        with_tools = beginning(messages(QUESTIONS[0]), TOOLS)
        assert with_tools > n
        assert 0 < beginning(messages("")[1:], TOOLS) < with_tools


def test_without_the_option_nothing_is_kept(model: mustafar.Model) -> None:
    with Engine(model, KV) as engine, serving(engine) as (url, _):
        with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
            for _ in range(2):
                answer = client.chat.completions.create(
                    model="demo", messages=messages("A"), max_tokens=2
                )
                assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert engine.stats().prefixes == 0


def test_any_beginning_where_reuse_is_approximate(model: mustafar.Model) -> None:
    with Engine(model, KV, prefix_cache="approximate") as engine, serving(engine) as (url, _):
        body = {"prompt": [*range(5, 105)], "max_tokens": 4, "temperature": 0}
        longer = {**body, "prompt": [*range(5, 110)]}
        first, second = (
            httpx2.post(url + "/v1/completions", json=each).json() for each in (body, longer)
        )
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
