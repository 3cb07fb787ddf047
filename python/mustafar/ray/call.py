"""A request between the processes, and what of it decides where it goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_CHARACTERS_PER_ID = 4


@dataclass(frozen=True)
class Call:
    """A request that has passed the gate.

    Attributes:
        identity: What logs and the answer call it.
        method, path, query: As HTTP has them, the path without what Ray's route_prefix adds.
        body: All of it.
        content_type: Of the body; may be empty.
        prompt: The text that Ray's PrefixCacheAffinityRouter looks at; empty: none. It is not sent
            on.
    """

    identity: str
    method: str
    path: str
    query: bytes
    body: bytes
    content_type: bytes
    prompt: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.identity, self.method, self.path, self.query, self.body, self.content_type)
        return Call, fields

    def with_prompt(self, prompt: str) -> Call:
        """The same, with the text that decides where it goes."""
        return replace(self, prompt=prompt)


@dataclass(frozen=True)
class Begins:
    """How a request begins.

    Attributes:
        prompt: The text of all of it, as far as it is text.
        key: Equal for those that begin alike; empty where there is no prompt.
    """

    prompt: str = ""
    key: str = ""


def begins(body: bytes, n_characters: int) -> Begins:
    """How a request's prompt begins; nothing where there is none that is understood.

    The routes say what is wrong with a body, not this. n_characters: of a text, see
    :class:`Options`.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Begins()
    if not isinstance(fields, Mapping):
        return Begins()
    if isinstance(messages := fields.get("messages"), list):
        opening = [_said(message) for message in _to_first_user(messages)]
        said = "\n".join(filter(None, map(_said, messages)))
        return Begins(said, _digest("\n".join(opening))) if said else Begins()
    prompt: Any = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # of several
    if isinstance(prompt, str) and prompt:
        return Begins(prompt, _digest(prompt[:n_characters]))
    if isinstance(prompt, list) and prompt:
        ids = max(1, n_characters // _CHARACTERS_PER_ID)
        text = " ".join(map(str, prompt))
        return Begins(text, _digest(" ".join(map(str, prompt[:ids]))))
    return Begins()


def _to_first_user(messages: list[Any]) -> list[Any]:
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return messages[: index + 1]
    return messages


def _said(message: Any) -> str:
    """A message's text, of its parts too."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def _digest(text: str) -> str:
    # Not the text itself: what it becomes stands in logs. A lone surrogate is refused elsewhere.
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
