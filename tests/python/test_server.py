"""The server as OpenAI's own client sees it, on the demo model."""

from __future__ import annotations

import asyncio
import json
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
from support.server import ForcedEngine, serving
from support.sessions import ids_of

MESSAGES = [{"role": "user", "content": "What does textwrap.dedent do?"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
]


@pytest.fixture(scope="module")
def model() -> Iterator[mustafar.Model]:
    with mustafar.Model(DEMO, dtype="f32", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def url(model: mustafar.Model) -> Iterator[str]:
    with mustafar.Engine(model, max_batch=16) as engine:
        with serving(engine) as (address, _):
            yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **body: Any) -> Any:
    fields = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **body}
    return client.chat.completions.create(**fields)


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_reply_is_that_of_the_library(client: openai.OpenAI, model: mustafar.Model) -> None:
    for body in ({}, {"temperature": 0.9, "seed": 5, "n": 2}, {"stop": ["e"]}, {"max_tokens": 1}):
        served = chat(client, **body)
        own = model.chat_completion(MESSAGES, **{"max_tokens": 12, "temperature": 0, **body})
        assert isinstance(own, dict)
        assert [c.message.content for c in served.choices] == [
            c["message"]["content"] for c in own["choices"]
        ]
        assert [c.finish_reason for c in served.choices] == [
            c["finish_reason"] for c in own["choices"]
        ]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(served.usage, name) == own["usage"][name]


def test_without_a_limit_a_reply_ends_by_itself_or_with_the_context(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=None)
    end, used = answer.choices[0].finish_reason, answer.usage.total_tokens
    assert end == "stop" if used < 1024 else end == "length"
    assert answer.usage.completion_tokens > 12
    full = chat(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert full.choices[0].finish_reason == "length"
    assert full.usage.total_tokens == 1024


@pytest.mark.parametrize("stop", [None, "whitespace", "leading whitespace"])
def test_a_stream_says_the_same(client: openai.OpenAI, stop: str | None) -> None:
    body = {"n": 2, "seed": 3, "logprobs": True, "top_logprobs": 2, "stop": stop}
    whole = chat(client, **body)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **body))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert text_of(chunks, choice.index) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        entries = [e for c in mine if c.logprobs for e in c.logprobs.content]
        # The token whose text a stop text cuts is among them where some of it is said.
        kept = choice.logprobs.content
        assert entries[: len(kept)] == kept and len(entries) <= len(kept) + bool(stop)
        assert all(len(e.top_logprobs) == 2 for e in entries)
    assert stop is None or "Remove any" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == ("stop" if stop else "length")
    # Text is handed out while it is made, with its entries.
    pieces = [c for chunk in chunks for c in chunk.choices if c.delta.content and c.index == 0]
    assert len(pieces) > 2 and all(c.logprobs.content for c in pieces[:-1])


def test_a_reply_goes_on_inside_the_last_message(
    client: openai.OpenAI, model: mustafar.Model
) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "It removes"}]
    served = chat(client, messages=begun, extra_body={"continue_final_message": True})
    own = model.chat_completion(begun, max_tokens=12, temperature=0, continue_final_message=True)
    assert isinstance(own, dict)
    assert served.choices[0].message.content == own["choices"][0]["message"]["content"]
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        chat(client, extra_body={"continue_final_message": True})


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(model: mustafar.Model, stream: bool) -> None:
    with ForcedEngine(model) as engine, serving(engine) as (url, _):
        engine.says = (
            'I look.<tool_call>{"name": "look_up", "arguments": {"word": "dedent"}}</tool_call>'
        )
        client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        answer = chat(client, tools=TOOLS, stream=stream, max_tokens=None)
        if stream:
            chunks = list(answer)
            calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
            text, reason = text_of(chunks), chunks[-1].choices[0].finish_reason
        else:
            message, reason = answer.choices[0].message, answer.choices[0].finish_reason
            calls, text = message.tool_calls, message.content
        assert [call.function.name for call in calls] == ["look_up"]
        assert json.loads(calls[0].function.arguments) == {"word": "dedent"}
        assert text == "I look." and reason == "tool_calls"
        none = chat(client, tools=TOOLS, tool_choice="none", max_tokens=None)
        assert none.choices[0].message.content == engine.says
        assert none.choices[0].finish_reason == "stop"


def test_continued_texts(client: openai.OpenAI, model: mustafar.Model) -> None:
    def complete(prompt: Any, **body: Any) -> Any:
        fields = {"model": "demo", "temperature": 0, "max_tokens": 6, **body}
        return client.completions.create(prompt=prompt, **fields)

    texts = ["The textwrap module", "def main("]
    ids = [model.tokenizer.encode(text) for text in texts]
    own = [result.text for result in model.generate(texts, temperature=0, max_new_tokens=6)]
    for prompts in (texts, ids):
        answer = complete(prompts)
        assert [choice.text for choice in answer.choices] == own
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert complete(ids[0]).choices[0].text == own[0]
    assert complete(texts[1], n=2).choices[1].text == own[1]
    assert len(complete(texts[0], max_tokens=None, logprobs=0).choices[0].logprobs.tokens) <= 16

    whole = complete(texts[0], logprobs=2).choices[0]
    assert whole.logprobs.token_logprobs == [
        entry.logprob
        for entry in model.generate([texts[0]], temperature=0, max_new_tokens=6, logprobs=2)[
            0
        ].logprobs
    ]
    assert all(len(top) == 2 for top in whole.logprobs.top_logprobs)
    offsets = whole.logprobs.text_offset
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] <= len(whole.text)
    chunks = [c.choices[0] for c in complete(texts[0], logprobs=2, stream=True)]
    assert "".join(c.text for c in chunks) == whole.text
    assert [t for c in chunks for t in c.logprobs.tokens] == whole.logprobs.tokens
    assert [t for c in chunks for t in c.logprobs.text_offset] == offsets
    assert chunks[-1].finish_reason == whole.finish_reason


def test_many_at_once_get_what_each_gets_alone(url: str, model: mustafar.Model) -> None:
    prompts = [ids_of(3 + 5 * (i % 13), seed=i, vocab=4096) for i in range(64)]
    sampled = {"temperature": 0.9, "max_new_tokens": 10, "ignore_eos": True}
    alone = [
        mustafar.Session(model).generate(prompt, seed=i, **sampled)
        for i, prompt in enumerate(prompts)
    ]

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        body: dict[str, Any] = {"model": "demo", "prompt": prompts[i], "seed": i}
        body |= {"temperature": 0.9, "max_tokens": 10, "extra_body": {"ignore_eos": True}}
        if i % 2:
            return (await client.completions.create(**body)).choices[0].text
        stream = await client.completions.create(stream=True, **body)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    assert asyncio.run(ask_all()) == [result.text for result in alone]


def test_conversations_at_once(url: str) -> None:
    talk = [{"role": "user", "content": "Words, and more of them. " * 30}]

    async def ask_all() -> list[int]:
        async with httpx2.AsyncClient(timeout=60) as client:
            body = {"messages": talk}
            asked = [client.post(url + "/tokenize", json=body) for _ in range(64)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [200] * 64


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("route", "body", "param", "code"),
    [
        (CHAT, {"n": 17}, "n", "invalid_value"),
        (CHAT, {"n": "2"}, "n", "invalid_type"),
        (CHAT, {"temperature": "hot"}, "temperature", "invalid_type"),
        (CHAT, {"temperature": -1}, "temperature", "invalid_value"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        (CHAT, {"response_format": {"type": "audio"}}, "response_format", "unsupported_value"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "unsupported_value"),
        (CHAT, {"guided_json": {}}, "guided_json", "unknown_parameter"),
        (CHAT, {"logits_processor": "x"}, "logits_processor", "unsupported_parameter"),
        (CHAT, {"stream": "yes"}, "stream", "invalid_type"),
        (CHAT, {"stream_options": 3}, "stream_options", "invalid_type"),
        (CHAT, {"stop": ["a"] * 17}, "stop", "invalid_value"),
        (CHAT, {"messages": None}, "messages", "invalid_value"),
        (CHAT, {"messages": []}, "messages", "invalid_type"),
        (CHAT, {"messages": ["hi"]}, "messages", "invalid_type"),
        (CHAT, {"messages": [{"content": "hi"}]}, "messages", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 1100}]}, "messages", "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "invalid_value"),
        (CHAT, {"tools": [{"function": 3}]}, "tools", "invalid_type"),
        (CHAT, {"model": 3}, "model", "invalid_type"),
        (TEXT, {"echo": True}, "echo", "unsupported_parameter"),
        (TEXT, {"suffix": "x"}, "suffix", "unsupported_parameter"),
        (TEXT, {"best_of": 3}, "best_of", "unsupported_parameter"),
        (TEXT, {"tools": TOOLS}, "tools", "unsupported_parameter"),
        (TEXT, {"logprobs": True}, "logprobs", "invalid_type"),
        (TEXT, {"prompt": None}, "prompt", "invalid_value"),
        (TEXT, {"prompt": ""}, None, None),  # BOS alone is a prompt
        (TEXT, {"prompt": []}, "prompt", "invalid_type"),
        (TEXT, {"prompt": [1, "a"]}, "prompt", "invalid_type"),
        (TEXT, {"prompt": [-1]}, "prompt", "invalid_value"),
        (TEXT, {"prompt": [99999]}, None, "invalid_value"),
        (TEXT, {"prompt": ["a"] * 9, "n": 2}, "n", "invalid_value"),
        (TEXT, {"prompt": [5] * 1025}, "prompt", "context_length_exceeded"),
        ("/v1/embeddings", {"input": "x"}, None, "unsupported_endpoint"),
        ("/tokenize", {"prompt": 3}, "prompt", "invalid_type"),
        ("/detokenize", {"tokens": "x"}, "tokens", "invalid_type"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(
    url: str, route: str, body: dict[str, Any], param: str | None, code: str | None
) -> None:
    usual = {"messages": MESSAGES} if route == CHAT else {"prompt": "a"} if route == TEXT else {}
    data = json.dumps({"max_tokens": 1, **usual, **body})
    answer = httpx2.post(url + route, content=data, headers=JSON, timeout=60)
    if code is None:
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"] and len(error["message"]) < 1000


def test_a_body_that_is_no_json(url: str) -> None:
    for data in (b"{", b"[1]", b'{"n": NaN}', b"[" * 100_000, b"\xff"):
        answer = httpx2.post(url + CHAT, content=data, headers=JSON)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_errors_as_the_client_raises_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        chat(client, temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.request_id
    with pytest.raises(openai.NotFoundError, match="gpt"):
        chat(client, model="gpt")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="/v1/images"):
        client.images.generate(prompt="a house")
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="demo", input="a")


def test_models(client: openai.OpenAI) -> None:
    assert [listed.id for listed in client.models.list()] == ["demo"]
    found = client.models.retrieve("demo")
    assert found.owned_by == "mustafar" and found.max_model_len == 1024
    assert found.kv["value_dtype"] == "int8"


def test_tokens(url: str, model: mustafar.Model) -> None:
    def post(route: str, **body: Any) -> Any:
        answer = httpx2.post(url + route, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    text = "Grüße, <|user|> 😀"
    ids = model.tokenizer.encode(text)
    assert post("/tokenize", prompt=text) == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": 1024,
    }
    bare = post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert bare == model.tokenizer.encode(text, False)
    assert post("/detokenize", tokens=bare) == {"prompt": text}
    assert post("/tokenize", messages=MESSAGES)["tokens"] == (
        model.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    )


def test_other_routes(url: str) -> None:
    assert httpx2.get(url + "/health").json() == {"status": "ok"}
    unknown = httpx2.get(url + "/v2/x")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "unknown_url"
    wrong = httpx2.get(url + CHAT)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"


def test_metrics(url: str, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        answer = httpx2.get(url + "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    list(chat(client, stream=True, max_tokens=7, extra_body={"ignore_eos": True}))
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("mustafar_generated_tokens_total") == 7
    assert grown("mustafar_prompt_tokens_total") > 5
    assert grown("mustafar_requests_finished_total") == 1
    assert after["mustafar_requests_repruned_total"] == 0
    assert grown("mustafar_time_to_first_token_seconds_count") == 1
    assert grown('mustafar_time_to_first_token_seconds_bucket{le="+Inf"}') == 1
    assert grown("mustafar_request_seconds_count") == 1
    route = f'mustafar_http_requests_total{{route="{CHAT}",status="200"}}'
    assert grown(route) == 1
    assert after["mustafar_requests_running"] == 0


def test_names_and_context_of_the_settings(model: mustafar.Model) -> None:
    settings = Settings(
        model_names=("a", "org/b"), context=64, reply_tokens=3, max_prompt_tokens=32
    )
    with mustafar.Engine(model) as engine, serving(engine, settings) as (url, _):
        client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        assert [listed.id for listed in client.models.list()] == ["a", "org/b"]
        assert client.models.retrieve("org/b").max_model_len == 64
        usual = chat(client, model="org/b", max_tokens=None, extra_body={"ignore_eos": True})
        assert usual.model == "org/b" and usual.usage.completion_tokens == 3
        full = chat(client, model="a", max_tokens=500, extra_body={"ignore_eos": True})
        assert full.usage.total_tokens == 64 and full.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="at most 32"):
            client.completions.create(model="a", prompt=[5] * 33)
