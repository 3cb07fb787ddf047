"""``GET /openapi.json``: what the routes take and give, as OpenAPI 3.1 describes it.

Small on purpose: fields and their kinds. What else a request may be refused for (a prompt that is
too long, two grammars at once) its answer says.
"""

from __future__ import annotations

from typing import Any

from .. import __version__
from .settings import Settings

Schema = dict[str, Any]

_MOST_STOPS = 16
_COUNTS = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_OBJECT = {"type": "object"}


def description(settings: Settings) -> Schema:
    """The whole description of a server with these settings."""
    keys = bool(settings.api_keys)
    said: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "mustafar",
            "version": __version__,
            "description": "Completions as OpenAI's API has them.",
        },
        "paths": {
            "/v1/chat/completions": _post(
                "The reply to a conversation", _chat(settings), "ChatCompletion", streams=True
            ),
            "/v1/completions": _post(
                "Texts that are continued", _text(settings), "TextCompletion", streams=True
            ),
            "/v1/models": _get("What is served", {"$ref": "#/components/schemas/Models"}),
            "/v1/models/{name}": {
                **_get("One of them", {"$ref": "#/components/schemas/Model"}),
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}],
            },
            "/tokenize": _post("Ids of a text or a conversation", _TOKENIZE, "Tokens"),
            "/detokenize": _post("The text of ids", _DETOKENIZE, "Prompt"),
            "/health": _health(),
            "/metrics": _get("Counts and times", _TEXT, "text/plain"),
        },
        "components": {"schemas": _ANSWERS},
    }
    if keys:
        said["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        said["security"] = [{"key": []}]
        said["paths"]["/health"]["get"]["security"] = []
    return said


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


_FAILS = {
    "description": "What is wrong, by its code",
    "content": _json({"$ref": "#/components/schemas/Error"}),
}


def _get(about: str, schema: Schema, media: str = "application/json") -> Schema:
    good = {"description": about, "content": {media: {"schema": schema}}}
    return {"get": {"summary": about, "responses": {"200": good, "default": _FAILS}}}


def _post(about: str, body: Schema, answer: str, streams: bool = False) -> Schema:
    content = _json({"$ref": f"#/components/schemas/{answer}"})
    if streams:
        content["text/event-stream"] = {}  # chunks, and what goes wrong on the way
    good = {"description": about, "content": content}
    return {
        "post": {
            "summary": about,
            "requestBody": {"required": True, "content": _json(body)},
            "responses": {"200": good, "default": _FAILS},
        }
    }


def _health() -> Schema:
    body = _json({"type": "object", "required": ["status"], "properties": {"status": _TEXT}})
    states = {
        "200": {"description": "It takes requests", "content": body},
        "503": {"description": "It is stopping", "content": body},
    }
    return {
        "get": {"summary": "Whether it takes requests", "responses": states | {"default": _FAILS}}
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _number(low: float | None = None, high: float | None = None) -> Schema:
    limits = {"minimum": low, "maximum": high}
    return {"type": "number", **{k: v for k, v in limits.items() if v is not None}}


def _common(settings: Settings) -> dict[str, Schema]:
    """Fields that both kinds of completions have; null is the default of each."""
    choices = {"type": "integer", "minimum": 1, "maximum": settings.max_choices}
    stops = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": _MOST_STOPS}
    fields: dict[str, Schema] = {
        "model": _TEXT,
        "stream": {"type": "boolean"},
        "stream_options": {"type": "object", "properties": {"include_usage": {}}},
        "n": choices,
        "max_tokens": _COUNTS,
        "max_completion_tokens": _COUNTS,
        "max_new_tokens": _COUNTS,
        "min_new_tokens": _COUNTS,
        "temperature": _number(0),
        "top_k": _COUNTS,
        "top_p": _number(0, 1),
        "min_p": _number(0, 1),
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
        "presence_penalty": _number(),
        "frequency_penalty": _number(),
        "penalty_window": {**_COUNTS, "minimum": -1},
        "logit_bias": {"type": "object", "additionalProperties": _number()},
        "seed": {"type": "integer", "minimum": -1, "maximum": 2**64 - 1},
        "stop": {"anyOf": [{"type": "string", "minLength": 1}, stops]},
        "stop_token_ids": {"type": "array", "items": _COUNTS, "maxItems": _MOST_STOPS},
        "ignore_eos": {"type": "boolean"},
        "response_format": {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
        },
        "grammar": _TEXT,
        "regex": _TEXT,
        "json_schema": {"type": ["object", "string"]},
    }
    # Taken, and without effect.
    for name in ("user", "metadata", "store", "service_tier", "safety_identifier",
                 "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"):  # fmt: skip
        fields[name] = {}
    return {name: _or_null(schema) if schema else schema for name, schema in fields.items()}


def _body(required: str, fields: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "required": [required],
        "properties": fields,
        "additionalProperties": False,
    }


def _chat(settings: Settings) -> Schema:
    fields = {
        **_common(settings),
        "messages": _MESSAGES,
        "tools": _or_null({"type": "array", "items": _OBJECT}),
        "tool_choice": _or_null({"enum": ["auto", "none"]}),
        "logprobs": _or_null({"type": "boolean"}),
        "top_logprobs": _or_null({"type": "integer", "minimum": 0, "maximum": 20}),
        "continue_final_message": _or_null({"type": "boolean"}),
        "add_generation_prompt": _or_null({"type": "boolean"}),
    }
    return _body("messages", fields)


def _text(settings: Settings) -> Schema:
    ids = {"type": "array", "items": _COUNTS, "minItems": 1}
    several = [{**_TEXTS, "minItems": 1}, {"type": "array", "items": ids, "minItems": 1}]
    fields = {
        **_common(settings),
        "prompt": {"anyOf": [_TEXT, ids, *several]},
        "logprobs": _or_null({"type": "integer", "minimum": 0, "maximum": 20}),
        "echo": {"enum": [False, None]},
        "suffix": {"enum": ["", None]},
        "best_of": {"description": "n, or nothing"},
    }
    return _body("prompt", fields)


_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": _TEXT,
        "content": {"anyOf": [_TEXT, {"type": "array"}, {"type": "null"}]},
    },
}
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1}
_TOKENIZE = {
    "type": "object",
    "anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
    "properties": {
        "model": _or_null(_TEXT),
        "prompt": _or_null(_TEXT),
        "messages": _or_null(_MESSAGES),
        "add_special_tokens": {"type": "boolean"},
        "parse_special": {"type": "boolean"},
    },
}
_DETOKENIZE = {
    "type": "object",
    "required": ["tokens"],
    "properties": {"model": _or_null(_TEXT), "tokens": {"type": "array", "items": _COUNTS}},
}


def _answer(kind: str, choice: str, about: Schema) -> Schema:
    fields = {
        "index": {"type": "integer"},
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
        choice: about,
    }
    one = {"type": "object", "required": list(fields), "properties": fields}
    whole = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": {"type": "integer"},
        "model": _TEXT,
        "choices": {"type": "array", "items": one},
        "usage": _USAGE,
    }
    return {"type": "object", "required": list(whole), "properties": whole}


def _record(**fields: Schema) -> Schema:
    return {"type": "object", "required": list(fields), "properties": fields}


_USAGE = _record(
    prompt_tokens={"type": "integer"},
    completion_tokens={"type": "integer"},
    total_tokens={"type": "integer"},
)
_REPLY = _record(role={"const": "assistant"}, content={"type": ["string", "null"]})
_ANSWERS: dict[str, Schema] = {
    "ChatCompletion": _answer("chat.completion", "message", _REPLY),
    "TextCompletion": _answer("text_completion", "text", _TEXT),
    "Model": _record(
        id=_TEXT, object={"const": "model"}, created={"type": "integer"}, owned_by=_TEXT,
        max_model_len={"type": "integer"}, kv=_OBJECT,
    ),
    "Models": _record(
        object={"const": "list"},
        data={"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    ),
    "Tokens": _record(
        tokens={"type": "array", "items": {"type": "integer"}},
        count={"type": "integer"},
        max_model_len={"type": "integer"},
    ),
    "Prompt": _record(prompt=_TEXT),
    "Error": _record(
        error=_record(
            message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code=_TEXT
        )
    ),
}  # fmt: skip
