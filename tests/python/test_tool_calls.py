"""Calls of tools in replies, as published models spell them."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar.tool_calls import ToolCallReader
from support.paths import DEMO

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
]
WEATHER, ADD = ("get_weather", {"city": "Köln"}), ("add", {"a": 1, "b": [2.5, None, True]})
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ADDED = '{"name": "add", "arguments": {"a": 1, "b": [2.5, null, true]}}'
CALLS: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = [
    (HERMES, "", [WEATHER]),
    (f"Let me look.\n\n{HERMES}\n<tool_call>{ADDED}</tool_call>", "Let me look.", [WEATHER, ADD]),
    (f"<tool_call>{ADDED}", "", [ADD]),  # the end of the turn closes it
    ('{"name": "get_weather", "parameters": {"city": "Köln"}}', "", [WEATHER]),
    (f"\n{ADDED}; {ADDED}", "", [ADD, ADD]),
    (f"<|python_tag|>{ADDED}", "", [ADD]),
    (f'{{"type": "function", "function": {ADDED}}}', "", [ADD]),
    (f"[TOOL_CALLS][{ADDED}]", "", [ADD]),
    (f"So:[TOOL_CALLS] [{ADDED}, {ADDED}]", "So:", [ADD, ADD]),
    ('[TOOL_CALLS]get_weather[ARGS]{"city": "Köln"}', "", [WEATHER]),
    ("[get_weather(city='Köln'), add(a=1, b=[2.5, None, True])]", "", [WEATHER, ADD]),
    ("[ add() ]", "", [("add", {})]),
]
TEXTS = [
    "",
    "  ",
    "plain\n",
    "{",
    "[",
    '{"answer": 42}',
    '{"name": "Bob", "age": 5}',
    '{"name": "add", "parameters": {"a": 1',
    '{"name": "add", "arguments": [1]}',
    '{"name": "add", "arguments": {}} is how it is called',
    "[1] is a footnote",
    "[add(a=x)]",
    "[add(1)]",
    "[add(a=1), 2]",
    "[add(a=__import__('os'))]",
    "Call add(a=1) or [add(a=1)] yourself",
    "Use <tool_call> tags",
    '<tool_call>{"name": "remove", "arguments": {}}</tool_call>',
    "a < b and <tool",
    "[TOOL_CALLS] is a mark",
]


def read(text: str, size: int) -> tuple[str, str, list[tuple[str, Any]]]:
    """What was handed out in pieces, the rest, and the calls."""
    reader = ToolCallReader(TOOLS)
    said = "".join(reader.push(text[i : i + size]) for i in range(0, len(text), size))
    rest, calls = reader.finish()
    return said, rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "expected", "calls"), CALLS)
def test_calls(text: str, expected: str, calls: list[Any], size: int) -> None:
    said, rest, found = read(text, size)
    assert (said + rest, found) == (expected, calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", TEXTS)
def test_what_only_looks_like_a_call_stays_text(text: str, size: int) -> None:
    said, rest, found = read(text, size)
    assert (said + rest, found) == (text, [])


def test_text_that_cannot_become_a_call_is_not_held_back() -> None:
    for text in ("[1] see there", '{"answer": 4', "Hello world", "a < b"):
        said, rest, _ = read(text, 1)
        assert (said, rest) == (text, "")
    assert read("Hello <tool", 1)[:2] == ("Hello", " <tool")


def random_value(rng: random.Random, depth: int = 3) -> Any:
    """A constant of Python that JSON has as well."""
    kind = rng.randrange(6 if depth == 0 else 8)
    if kind == 0:
        return rng.choice([True, False, None])
    if kind == 1:
        return rng.randint(-(2**62), 2**62) >> rng.randrange(63)
    if kind == 2:
        return rng.choice([0.0, -1.5e-7, 1e22, rng.uniform(-1e3, 1e3), rng.gauss(0, 1) * 1e-300])
    if kind < 6:
        return "".join(
            chr(
                rng.choice(
                    [rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]
                )
            )
            for _ in range(rng.randrange(8))
        )
    values = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return tuple(values) if rng.random() < 0.3 else values
    return {
        random_value(rng, 0) if rng.random() < 0.3 else f"k{i}": v for i, v in enumerate(values)
    }


def test_python_constants_are_what_python_reads() -> None:
    rng = random.Random(7)
    for _ in range(3000):
        value = random_value(rng)
        reader = ToolCallReader(TOOLS)
        assert reader.push(f"[add(a={value!r})]") == ""
        rest, calls = reader.finish()
        assert (rest, [call.name for call in calls]) == ("", ["add"]), value
        assert json.loads(calls[0].arguments) == json.loads(json.dumps({"a": value})), value


def forced(ids: list[int]) -> Any:
    """A logits_processor that makes the model say these ids."""
    said = iter(ids)

    def process(_: np.ndarray, logits: np.ndarray) -> None:
        chosen = next(said)
        logits[:] = -np.inf
        logits[chosen] = 0

    return process


@pytest.mark.parametrize(("text", "expected", "calls"), CALLS[:2] + CALLS[3:4])
def test_chat_completion(text: str, expected: str, calls: list[Any]) -> None:
    with mustafar.Model(DEMO, threads=1) as model:
        tokenizer = model.tokenizer
        ids = [*tokenizer.encode(text, add_special=False), model.config["eos_token_ids"][0]]
        messages = [{"role": "user", "content": "Weather?"}]

        def complete(**options: Any) -> Any:
            body = {"tools": TOOLS, "max_tokens": 400, **options}
            processor = forced(ids)
            return model.chat_completion(messages, logits_processor=processor, **body)

        choice = complete()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == (expected or None)
        made = [call["function"] for call in message["tool_calls"]]
        assert [(c["name"], json.loads(c["arguments"])) for c in made] == calls
        assert len({call["id"] for call in message["tool_calls"]}) == len(calls)
        # They go back to the model as they came.
        results = [{"role": "tool", "tool_call_id": "x", "content": "4"}]
        again = model.chat_completion(
            [*messages, {**message, "content": ""}, *results], max_tokens=1
        )
        assert again["usage"]["completion_tokens"] == 1

        deltas = [chunk["choices"][0] for chunk in complete(stream=True)]
        assert "".join(d["delta"].get("content", "") for d in deltas) == expected
        streamed = [c for d in deltas for c in d["delta"].get("tool_calls", ())]
        assert [c["index"] for c in streamed] == list(range(len(calls)))
        assert [c["function"] for c in streamed] == made
        assert deltas[-1]["finish_reason"] == "tool_calls"

        for without in ({"tools": None}, {"tool_choice": "none"}):
            plain = complete(**without)["choices"][0]
            assert plain["message"] == {"role": "assistant", "content": text}
            assert plain["finish_reason"] == "stop"
