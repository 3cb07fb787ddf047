"""``POST /tokenize`` and ``/detokenize``, in the shape that other servers have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool

from .. import checks, completion
from .errors import ApiError, client_errors
from .fields import list_field
from .service import Service


async def tokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of ``prompt``, or of what the chat template makes of ``messages``."""
    service.check_model(body)
    with client_errors(body):
        ids = await run_in_threadpool(_encode, service, body)
    return {"count": len(ids), "max_model_len": service.context, "tokens": ids}


def _encode(service: Service, body: Mapping[str, Any]) -> list[int]:
    prompt, messages = body.get("prompt"), body.get("messages")
    special = checks.flag("add_special_tokens", body.get("add_special_tokens", True))
    parse = checks.flag("parse_special", body.get("parse_special", False))
    if not isinstance(prompt, str if messages is None else (str, type(None))):
        raise TypeError(f"prompt must be a text, not {prompt!r}")
    if messages is None:
        return service.tokenizer.encode(str(prompt), special, parse)
    tools = body.get("tools") or None
    return service.prompts.ids(
        completion.plain_messages(list_field(body, "messages")), tools, False
    )


async def detokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of ``tokens``."""
    service.check_model(body)
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise ApiError(400, "tokens must be a list of ids", "invalid_type", "tokens")
    with client_errors(body):
        ids = [checks.integer("tokens", id, 0) for id in tokens]
        return {"prompt": await run_in_threadpool(service.tokenizer.decode, ids)}
