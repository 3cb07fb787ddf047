"""The server's own description, and requests that are made from it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")
jsonschema = pytest.importorskip("jsonschema")

import mustafar
from mustafar import completion
from mustafar.server import Settings, openapi
from support.paths import DEMO
from support.server import serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # Replies are short, whatever is asked for.
    settings = Settings(context=64, max_choices=4, max_grammar_bytes=4096)
    with mustafar.Model(DEMO, threads=1) as model, mustafar.Engine(model) as engine:
        with serving(engine, settings) as (address, _):
            yield address


def schema_of(description: Any, path: str, status: str | None = None) -> Any:
    """Of a body, or of the JSON that is answered."""
    route = description["paths"][path]
    route = route.get("post") or route["get"]
    part = route["requestBody"] if status is None else route["responses"][status]
    schema = part["content"]["application/json"]["schema"]
    return {**schema, "components": description["components"]}


def test_it_is_a_description(url: str) -> None:
    said = httpx2.get(url + "/openapi.json").json()
    assert said["openapi"] == "3.1.0" and said["info"]["version"] == mustafar.__version__
    for path in said["paths"].keys() - {"/metrics"}:  # which is no JSON
        jsonschema.Draft202012Validator.check_schema(schema_of(said, path, "200"))
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        jsonschema.Draft202012Validator.check_schema(schema_of(said, path))
    assert "securitySchemes" not in said["components"]
    keyed = openapi.description(Settings(api_keys=("a",)))
    assert keyed["security"] and keyed["paths"]["/health"]["get"]["security"] == []


def test_it_knows_every_field() -> None:
    said = openapi.description(Settings())
    sampling = {field.name for field in dataclasses.fields(mustafar.SamplingParams)}
    sampling -= {"logits_processor"}  # refused
    for path in (CHAT, TEXT):
        fields = schema_of(said, path)["properties"].keys()
        assert sampling <= fields
        assert completion._WITHOUT_EFFECT <= fields


def test_it_knows_every_route(url: str) -> None:
    said = httpx2.get(url + "/openapi.json").json()["paths"]
    for path in said:
        answer = httpx2.request("OPTIONS", url + path.replace("{name}", "demo"))
        allowed = {method.lower() for method in answer.headers["allow"].split(", ")}
        assert answer.status_code == 405 and said[path].keys() - {"parameters"} <= allowed


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": MESSAGES, "logprobs": True, "n": 2, "stop": ["x"], "user": "me"}),
        (CHAT, {"messages": MESSAGES, "tools": None, "temperature": None, "model": "demo"}),
        (TEXT, {"prompt": "a", "logprobs": 2, "echo": False, "suffix": None, "seed": -1}),
        (TEXT, {"prompt": [[5, 6], [7]], "logit_bias": {"5": -1.5}}),
        ("/tokenize", {"prompt": "a b"}),
        ("/tokenize", {"messages": MESSAGES}),
        ("/detokenize", {"tokens": [5, 6]}),
        (CHAT, {"messages": MESSAGES, "wibble": 1}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "user", "content": False}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": 3}]}),
        ("/tokenize", {"messages": MESSAGES, "prompt": 3}),
        ("/tokenize", {"messages": []}),
        (CHAT, {"messages": MESSAGES, "top_p": 2}),
        (TEXT, {"prompt": "a", "n": 5}),
        (TEXT, {"prompt": "a", "echo": True}),
        (TEXT, {"prompt": "a", "max_tokens": "3"}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_it_says_what_is_taken_and_answered(url: str, path: str, body: dict[str, Any]) -> None:
    said = httpx2.get(url + "/openapi.json").json()
    described = jsonschema.Draft202012Validator(schema_of(said, path)).is_valid(body)
    if path in (CHAT, TEXT):
        body = {"max_tokens": 2, **body}
    answer = httpx2.post(url + path, json=body, timeout=60)
    assert (answer.status_code == 200) == described, answer.text
    schema = schema_of(said, path, "200" if described else "default")
    jsonschema.validate(answer.json(), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("right", [True, False])
def test_requests_made_from_it(url: str, right: bool) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    mode = schemathesis.GenerationMode.POSITIVE if right else schemathesis.GenerationMode.NEGATIVE
    seen: Counter[int] = Counter()
    said = httpx2.get(url + "/openapi.json").json()

    def ask(case: Any) -> None:
        answer = case.call(timeout=60)
        seen[answer.status_code] += 1
        # What is as described may still be refused: two grammars, a token that the model lacks. And
        # what breaks one alternative of the description may be right by another.
        case.validate_response(
            answer,
            excluded_checks=[checks.positive_data_acceptance, checks.negative_data_rejection],
        )
        if answer.status_code == 200 and case.operation.method.upper() == "POST":
            described = schema_of(said, case.operation.path)
            jsonschema.validate(case.body, described, jsonschema.Draft202012Validator)

    operations = [(path, "POST") for path in (CHAT, TEXT, "/tokenize", "/detokenize")]
    if right:  # of these nothing can be wrong
        operations += [("/v1/models", "GET"), ("/v1/models/{name}", "GET")]
    for path, method in operations:
        settings = hypothesis.settings(
            max_examples=25,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        made = schema[path][method].as_strategy(generation_mode=mode)
        settings(hypothesis.given(case=made)(ask))()
    assert seen[200] > 20 if right else seen[400] > 40
