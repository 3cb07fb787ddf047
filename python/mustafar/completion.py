"""Replies to conversations in the shape of OpenAI's API, and how a conversation is made.

Below :class:`Model`, :class:`Session` and :class:`Chat`, which use it: it works on native objects.
"""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import _core
from ._core import ChatTemplate
from .stream import ChatStream
from .types import SamplingParams

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

_FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "stop",
}

_RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


def native_chat(
    model: _core.Model,
    session: _core.Session,
    *,
    system: str | None = None,
    tools: Tools | None = None,
    chat_template: ChatTemplate | str | os.PathLike[str] | None = None,
    date: str | datetime.date | None = None,
    context_shift: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> _core.Chat:
    """A conversation over a session of the model; arguments as :class:`Chat` takes them."""
    if isinstance(chat_template, (str, os.PathLike)):
        chat_template = ChatTemplate.from_argument(os.fspath(chat_template), model.folder())
    return _core.Chat(
        session,
        chat_template,
        system,
        json.dumps(list(tools)) if tools else "",
        json.dumps(dict(variables)) if variables else "",
        date.isoformat() if isinstance(date, datetime.date) else date,
        context_shift,
    )


def set_messages(chat: _core.Chat, messages: Sequence[Message]) -> None:
    """Replaces the messages of a conversation."""
    chat.set_messages_json(json.dumps(list(messages)))


def chat_completion(
    model: _core.Model,
    session: _core.Session,
    messages: Sequence[Message],
    *,
    stream: bool,
    tools: Tools | None,
    chat_template: ChatTemplate | str | os.PathLike[str] | None,
    params: SamplingParams | None,
    sampling: dict[str, Any],
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """See :meth:`Model.chat_completion`."""
    for theirs, ours in _RENAMED.items():
        if theirs in sampling:
            sampling[ours] = sampling.pop(theirs)
    if sampling.get("stop") is None:
        sampling.pop("stop", None)
    native = SamplingParams.merge(params, sampling)._native()
    chat = native_chat(model, session, tools=tools, chat_template=chat_template)
    set_messages(chat, messages)
    reply = ChatStream(chat.reply(native))
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model.folder().name,
    }
    if stream:
        return _chunks(reply, head)
    result = reply._finish()
    prompt_tokens = result.stats.prompt_tokens + reply.cached_tokens
    return {
        **head,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": result.text},
                "finish_reason": _FINISH_REASONS[result.finish_reason],
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(result.token_ids),
            "total_tokens": prompt_tokens + len(result.token_ids),
            "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
        },
    }


def _chunks(reply: ChatStream, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    with reply:
        yield chunk({"role": "assistant", "content": ""})
        for piece in reply:
            yield chunk({"content": piece})
        yield chunk({}, _FINISH_REASONS[reply.result.finish_reason])
