"""chat_completion as OpenAI's clients call it, and arguments of the wrong kind, refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import ChatTemplate, KVConfig, SamplingParams, Session
from support.paths import DEMO

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if tools %}<tools>{{ tools | length }}\n{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model() -> mustafar.Model:
    return mustafar.Model(DEMO, threads=1)


def complete(model: mustafar.Model, messages: Any = MESSAGES, /, **body: Any) -> dict[str, Any]:
    body = {"max_tokens": 5, "temperature": 0, **body}
    answer = model.chat_completion(messages, chat_template=ChatTemplate(TEMPLATE), **body)
    assert isinstance(answer, dict)
    json.dumps(answer)
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_null_is_the_default(model: mustafar.Model) -> None:
    nulls = dict.fromkeys(
        "top_p stop seed tools frequency_penalty presence_penalty logit_bias logprobs n top_logprobs"
        " response_format tool_choice stream_options metadata user".split()
    )
    assert texts(complete(model, **nulls)) == texts(complete(model))
    assert SamplingParams(temperature=None).temperature == SamplingParams().temperature  # type: ignore[arg-type]
    result = Session(model).generate("x", max_new_tokens=2, stop=None, temperature=None)
    assert len(result.token_ids) <= 2


def test_fields_about_the_client_have_no_effect(model: mustafar.Model) -> None:
    body = {"model": "gpt", "user": "u", "metadata": {"a": "b"}, "store": False, "n": 1}
    assert texts(complete(model, **body)) == texts(complete(model))


def test_the_newer_name_of_the_limit_counts(model: mustafar.Model) -> None:
    assert complete(model, max_completion_tokens=2)["usage"]["completion_tokens"] == 2
    assert complete(model, max_completion_tokens=None)["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("n", 0, ValueError),
        ("n", "2", TypeError),
        ("top_logprobs", 2, ValueError),  # without logprobs
        ("logprobs", "yes", TypeError),
        ("response_format", {"type": "xml"}, ValueError),
        ("response_format", "text/plain", TypeError),
        ("tool_choice", "required", ValueError),
        ("max_tokens", 2.5, TypeError),
        ("max_tokens", -1, ValueError),
        ("temperature", "hot", TypeError),
        ("top_k", True, TypeError),
        ("seed", -2, ValueError),
        ("seed", 2**64, ValueError),
        ("stop", 3, TypeError),
        ("stop", ["a", 3], TypeError),
        ("stop_token_ids", "12", TypeError),
        ("logit_bias", [1], TypeError),
        ("logit_bias", {"1": "much"}, TypeError),
        ("ignore_eos", 1, TypeError),
        ("logits_processor", 3, TypeError),
        ("guided_json", {}, TypeError),
    ],
)
def test_what_is_wrong_is_named(
    model: mustafar.Model, field: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=field):
        complete(model, **{field: value})


@pytest.mark.parametrize("messages", [None, 3, "Hi", {"role": "user"}, [3], [{"role": 3}], [{}]])
def test_messages_of_another_kind_are_named(model: mustafar.Model, messages: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="^messages"):
        model.chat_completion(messages, max_tokens=1)


@pytest.mark.parametrize("tools", [3, "add", [3], [{"function": 3}], {"name": "add"}])
def test_tools_of_another_kind_are_named(model: mustafar.Model, tools: Any) -> None:
    with pytest.raises(TypeError, match="^tools"):
        complete(model, tools=tools)


def test_other_number_types_are_as_good(model: mustafar.Model) -> None:
    session = Session(model)
    for sampling in (
        {"seed": np.int64(3)},
        {"seed": -1},
        {"max_new_tokens": np.int32(2)},
        {"temperature": np.float32(0.5)},
        {"temperature": 1},
        {"top_k": np.int64(5), "top_p": np.float64(0.5)},
        {"stop_token_ids": np.array([7])},
        {"ignore_eos": np.bool_(True)},
        {"logit_bias": {np.int64(3): np.float32(1)}},
    ):
        session.reset()
        assert session.generate("x = ", **{"max_new_tokens": 2, **sampling}).token_ids
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(logit_bias={"7": 1}).logit_bias == {7: 1.0}  # type: ignore[dict-item]


def test_content_in_parts_and_the_developer(model: mustafar.Model) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    as_parts = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "a\nb"}]
    assert complete(model, as_parts)["usage"] == complete(model, plain)["usage"]
    assert texts(complete(model, as_parts)) == texts(complete(model, plain))
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(ValueError, match=r"messages\[0\]\.content\[0\].*text"):
        complete(model, [{"role": "user", "content": image}])
    with pytest.raises(TypeError, match=r"messages\[1\]"):
        complete(model, [*MESSAGES, "text"])


def test_tools_reach_the_template_unless_none_may_be_called(model: mustafar.Model) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    without = complete(model)["usage"]["prompt_tokens"]
    assert complete(model, tools=tools)["usage"]["prompt_tokens"] > without
    assert complete(model, tools=tools, tool_choice="none")["usage"]["prompt_tokens"] == without


def test_several_choices_compute_the_prompt_once(model: mustafar.Model) -> None:
    answer = complete(model, n=3, temperature=1.5, seed=4)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert texts(answer)[0] == texts(complete(model, temperature=1.5, seed=4))[0]
    assert len(set(texts(answer))) > 1
    assert texts(complete(model, n=3, temperature=1.5, seed=4)) == texts(answer)
    one = complete(model)["usage"]
    assert answer["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 3 * one["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kv", [KVConfig(sparsity=0.5), KVConfig.preset("balanced")])
def test_every_choice_is_what_it_is_alone(
    model: mustafar.Model, kv: KVConfig, stream: bool
) -> None:
    # The prompt ends in the middle of a block, and replies go on beyond it.
    messages = [{"role": "user", "content": "a ship on the sea " * 9}]
    body = {"kv": kv, "max_tokens": 90, "temperature": 1.0, "logprobs": True, "ignore_eos": True}
    alone = [complete(model, messages, seed=4 + i, **body)["choices"][0] for i in range(3)]
    with Session(model, kv) as session:
        body |= {"chat_template": ChatTemplate(TEMPLATE), "session": session, "n": 3, "seed": 4}
        del body["kv"]
        if not stream:
            choices = model.chat_completion(messages, **body)["choices"]
            assert [c["logprobs"] for c in choices] == [c["logprobs"] for c in alone]
            assert [c["message"] for c in choices] == [c["message"] for c in alone]
            return
        made = ["", "", ""]
        for chunk in model.chat_completion(messages, stream=True, **body):
            for choice in chunk["choices"]:
                made[choice["index"]] += choice["delta"].get("content") or ""
        assert made == [c["message"]["content"] for c in alone]


def test_choices_where_the_budget_has_no_room_for_a_copy(model: mustafar.Model) -> None:
    body = {"max_tokens": 3, "n": 2, "kv": KVConfig(sparsity=0.5)}
    expected = texts(complete(model, **body))
    peak = 0
    for budget in range(8_000, 400_000, 8_000):
        with mustafar.Model(DEMO, threads=1, kv_budget=budget) as small:
            try:
                made = texts(complete(small, **body))
            except mustafar.OutOfMemory:
                assert peak == 0, "more bytes were too few"
                continue
            assert made[0] == expected[0]
            peak = peak or small.memory().kv_peak_bytes
    assert made == expected
    assert peak > 0


def test_log_probabilities(model: mustafar.Model) -> None:
    assert complete(model)["choices"][0]["logprobs"] is None
    answer = complete(model, logprobs=True, top_logprobs=2)["choices"][0]
    content = answer["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
    alone = complete(model, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [e["logprob"] for e in alone] == [e["logprob"] for e in content]
    assert all(e["top_logprobs"] == [] for e in alone)


def test_a_stream_says_the_same(model: mustafar.Model) -> None:
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "n": 2, "logprobs": True}
    whole = complete(model, **body)
    chunks = list(
        model.chat_completion(
            MESSAGES,
            chat_template=ChatTemplate(TEMPLATE),
            stream=True,
            stream_options={"include_usage": True},
            **body,
        )
    )
    assert all(isinstance(chunk, dict) for chunk in chunks)
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        said = [entry for c in mine for entry in (c["logprobs"] or {"content": []})["content"]]
        assert said == choice["logprobs"]["content"]
