"""Output after a grammar, a regular expression or a JSON schema."""

from __future__ import annotations

import json
import re
import sys
import threading
from typing import Any

import pytest

import mustafar
from mustafar import Chat, ChatTemplate, SamplingParams, Session
from support.paths import DEMO, MODELS, ROOT, model_folder
from support.schemas import PERSON

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

TEMPLATE = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
MESSAGES = [{"role": "user", "content": "Hi"}]
HOT: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
TEXT = "def f(x):\n\treturn  'Ω≈ç 😀', 12 # Once upon a time"
SUM = """
start: term ("+" term)* "=" NUMBER
term: NUMBER | "(" start ")"
NUMBER: /[0-9]{1,2}/
"""


@pytest.fixture(scope="module")
def model() -> mustafar.Model:
    return mustafar.Model(DEMO, threads=1)


def complete(model: mustafar.Model, **body: Any) -> Any:
    return model.chat_completion(MESSAGES, chat_template=TEMPLATE, **{"max_tokens": 200, **body})


def json_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_is_kept_at_temperature_one(model: mustafar.Model, seed: int) -> None:
    result = Session(model).generate("x", json_schema=PERSON, seed=seed, **HOT)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), PERSON)


TREE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{3,8}$"},
                "size": {"type": "number", "minimum": 10},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3},
            },
            "required": ["name", "size", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
LONG: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 200},
        "kind": {"enum": ["first", "second"]},
        "more": {"type": "array", "minItems": 2, "items": {"type": "string"}},
    },
    "required": ["text", "kind", "more"],
}


PATTERNS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "email": {"type": "string", "format": "email"},
        "at": {"type": "string", "format": "date-time"},
        "code": {"type": "string", "pattern": "^([a-z{}]+[0-9]){2,}[A-F]{3}-x$"},
        "id": {"type": "string", "format": "uuid"},
    },
    "required": ["email", "at", "code", "id"],
}


@pytest.mark.parametrize("schema", [TREE, LONG, PATTERNS, {"type": "object"}, {"type": "array"}])
def test_a_limit_closes_json_before_it_cuts_it(model: mustafar.Model, schema: Any) -> None:
    closed = 0
    for seed in range(8):
        for limit in (300, 500):
            params = {**HOT, "json_schema": schema, "seed": seed, "max_new_tokens": limit}
            result = Session(model).generate("x", **params)
            jsonschema.validate(json.loads(result.text), schema)
            assert len(result.token_ids) <= limit
            if result.finish_reason == "length":
                closed += 1
            else:
                assert result.finish_reason == "stop"
    assert closed > 0 or schema == {"type": "array"}  # which may end at any time
    # So does the context, alone and in the engine.
    with Session(model, max_tokens=300) as session:
        result = session.generate("x", json_schema=schema, seed=1, **HOT, max_new_tokens=1000)
        jsonschema.validate(json.loads(result.text), schema)
    [result] = model.generate(["x"], json_schema=schema, seed=1, **HOT, max_new_tokens=300)
    jsonschema.validate(json.loads(result.text), schema)


def test_a_limit_that_no_whole_text_fits_cuts_it(model: mustafar.Model) -> None:
    result = Session(model).generate("x", json_schema=LONG, seed=1, **HOT, max_new_tokens=20)
    assert (result.finish_reason, len(result.token_ids)) == ("length", 20)
    result = Session(model).generate("x", regex="[ab]{50}", seed=1, **HOT, max_new_tokens=9)
    assert result.finish_reason == "length"
    assert re.fullmatch("[ab]+", result.text)


def test_a_regex_matches_the_whole_text(model: mustafar.Model) -> None:
    regex = "(yes|no), [0-9]{3}-[a-f]{2}é?"
    for seed in range(10):
        result = Session(model).generate("Well? ", regex=regex, seed=seed, **HOT)
        assert re.fullmatch(regex, result.text), result.text
        assert result.finish_reason == "stop"


def test_bytes_of_characters_that_are_no_tokens(model: mustafar.Model) -> None:
    result = Session(model).generate("x", regex="Ω≈ç√∫😀{2}", **HOT)
    assert result.text == "Ω≈ç√∫😀😀"


def test_a_grammar_is_kept(model: mustafar.Model) -> None:
    result = Session(model).generate("x", grammar=SUM, seed=2, **HOT, max_new_tokens=400)
    assert result.finish_reason in ("stop", "length")
    assert re.fullmatch(r"[0-9()+=]+", result.text)
    if result.finish_reason == "stop":
        assert result.text.count("(") == result.text.count(")")
        assert re.search(r"=[0-9]{1,2}$", result.text)


def test_the_end_of_the_grammar_ends_the_output(model: mustafar.Model) -> None:
    session = Session(model)
    result = session.generate("x", regex="abc", ignore_eos=True)
    assert (result.text, result.finish_reason) == ("abc", "stop")
    assert session.tokens[-len(result.token_ids) :] == result.token_ids


def test_the_output_may_end_only_where_it_is_whole(model: mustafar.Model) -> None:
    tokenizer = model.tokenizer
    (comma,) = tokenizer.encode(",", False)
    # The comma may end the output, which it does as soon as the grammar lets it.
    sampling: dict[str, Any] = {"stop_token_ids": [comma], "logit_bias": {comma: 100}, **HOT}
    result = Session(model).generate("x", regex="(ab){2,50}", **sampling)
    assert (result.text, result.token_ids[-1]) == ("abab", comma)
    result = Session(model).generate("x", regex="(ab){2,50}", min_new_tokens=5, **sampling)
    assert len(result.token_ids) >= 6 and re.fullmatch("(ab){2,50}", result.text)


def test_the_limit_cuts_the_output(model: mustafar.Model) -> None:
    result = Session(model).generate("x", regex="a{2000}", max_new_tokens=6, **HOT)
    assert result.finish_reason == "length" and set(result.text) == {"a"}


def test_special_tokens_match_no_text(model: mustafar.Model) -> None:
    special = [id for id in range(model.config["vocab_size"]) if model.tokenizer.is_special(id)]
    likely = {id: 50.0 for id in special}
    result = Session(model).generate(
        "x", regex="(?s).{60}", logit_bias=likely, ignore_eos=True, **HOT
    )
    assert special and not set(result.token_ids) & set(special)


def test_a_stream_hands_out_the_same(model: mustafar.Model) -> None:
    sampling = {"json_schema": PERSON, "seed": 4, **HOT}
    whole = Session(model).generate("x", **sampling).text
    assert "".join(Session(model).stream("x", **sampling)) == whole


def test_every_prompt_of_a_batch_has_its_own(model: mustafar.Model) -> None:
    prompts = ["x", "Some more text", "y = "]
    results = model.generate(prompts, json_schema=PERSON, seed=1, **HOT)
    for result in results:
        jsonschema.validate(json.loads(result.text), PERSON)
    alone = [Session(model).generate(p, json_schema=PERSON, seed=1, **HOT) for p in prompts]
    assert [r.text for r in results] == [r.text for r in alone]
    each = [SamplingParams(regex="[0-9]{4}"), None, SamplingParams(grammar='start: "ok"')]
    digits, _, ok = model.generate(prompts, each, max_new_tokens=9)
    assert re.fullmatch("[0-9]{4}", digits.text) and ok.text == "ok"


def test_conversations_take_them_too(model: mustafar.Model) -> None:
    chat = Chat(model, chat_template=TEMPLATE)
    assert re.fullmatch("[a-z]{3}", chat.send("Hi", regex="[a-z]{3}").text)
    assert re.fullmatch("[0-9]{3}", chat.send("And?", regex="[0-9]{3}", **HOT).text)
    assert re.fullmatch("[A-Z]", chat.regenerate(regex="[A-Z]").text)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_response_format_makes_every_choice_json(model: mustafar.Model) -> None:
    body = {"response_format": json_format(PERSON), "n": 3, "seed": 1, **HOT}
    answer = complete(model, **body)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    streamed = ["", "", ""]
    for chunk in complete(model, stream=True, **body):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_json_object_makes_an_object(model: mustafar.Model) -> None:
    body = {"response_format": {"type": "json_object"}, "seed": 3, **HOT}
    # Any object: make it a short one.
    close = model.tokenizer.encode("}", False)[0]
    answer = complete(model, logit_bias={close: 100}, **body)
    assert json.loads(answer["choices"][0]["message"]["content"]) == {}
    assert complete(model, response_format={"type": "text"}, max_tokens=2)


def test_a_reply_in_a_format_calls_no_tools(model: mustafar.Model) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"type": "object", "properties": {"name": {"const": "f"}}, "required": ["name"]}
    schema = {**call, "additionalProperties": False}
    answer = complete(model, tools=[tool], response_format=json_format(schema))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"name": "f"}
    free = complete(model, tools=[tool], json_schema=schema)  # a grammar of one's own may call
    assert free["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("parameter", "value", "error"),
    [
        ("grammar", "start: nothing", ValueError),
        ("grammar", "start: ((", ValueError),
        ("grammar", 3, TypeError),
        ("regex", "(a", ValueError),
        ("regex", ["a"], TypeError),
        ("json_schema", {"type": "banana"}, ValueError),
        ("json_schema", {"unevaluatedProperties": False}, ValueError),
        ("json_schema", {"type": "string", "minLength": 5, "maxLength": 2}, ValueError),
        ("json_schema", {"const": {1, 2}}, ValueError),
        ("json_schema", '{"type":', ValueError),
        ("json_schema", "[]", TypeError),
        ("json_schema", 3, TypeError),
        ("response_format", "json_object", TypeError),
        ("response_format", {"type": "xml"}, ValueError),
        ("response_format", {}, ValueError),
        ("response_format", {"type": "json_object", "schema": {}}, ValueError),
        ("response_format", {"type": "json_schema"}, ValueError),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, ValueError),
    ],
)
def test_what_is_wrong_is_named(
    model: mustafar.Model, parameter: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=parameter):
        complete(model, **{parameter: value})
    if parameter != "response_format":
        with pytest.raises(error, match=parameter):
            model.generate(["x"], **{parameter: value})


def test_there_is_one_grammar_at_most(model: mustafar.Model) -> None:
    with pytest.raises(ValueError, match="regex and json_schema"):
        SamplingParams(regex="a", json_schema={})
    with pytest.raises(ValueError, match="response_format and regex"):
        complete(model, regex="a", response_format={"type": "json_object"})


def test_a_missing_library_is_named(model: mustafar.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"regex .*pip install 'mustafar\[grammar\]'"):
        Session(model).generate("x", regex="a")


def test_several_threads_at_once(model: mustafar.Model) -> None:
    texts: dict[int, str] = {}

    def run(i: int) -> None:
        sampling = {"json_schema": PERSON, "seed": i, **HOT}
        texts[i] = Session(model).generate("x", **sampling).text

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 3
    for text in texts.values():
        jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("name", list(MODELS))
def test_bytes_of_tokens_make_the_text(name: str) -> None:
    tokenizer = mustafar.Tokenizer(model_folder(name))
    text = "Once upon a time, there was a dog." if name == "story" else TEXT  # it has no bytes
    ids = tokenizer.encode(text, add_special=False)
    made = b"".join(map(tokenizer.token_bytes, ids))
    assert made.decode().removeprefix(" ") == text
    with pytest.raises(mustafar.TokenizerError):
        tokenizer.token_bytes(tokenizer.vocab_size)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_tokenizer_serves(name: str) -> None:
    with mustafar.Model(model_folder(name), threads=1) as loaded:
        result = Session(loaded).generate("Once", regex=" [a-z]{2,9} (dog|cat)\\.", seed=1, **HOT)
        assert re.fullmatch(r" [a-z]{2,9} (dog|cat)\.", result.text), result.text


@pytest.mark.real_model
def test_a_real_model_keeps_schemas(smollm2: Any) -> None:
    cases = json.loads((ROOT / "bench" / "structured_output_schemas.json").read_text())
    loaded = mustafar.Model(smollm2)
    for case in cases[::4]:
        answer = loaded.chat_completion(
            [{"role": "user", "content": case["prompt"]}],
            response_format=json_format(case["schema"]),
            seed=1,
            max_tokens=300,
            **HOT,
        )
        (choice,) = answer["choices"]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), case["schema"])
