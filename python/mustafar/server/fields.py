"""Fields that both kinds of completions have, beyond what the library itself checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ApiError, refused

_LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
_MOST_STOPS = 16
_MOST_BIASES = 1024


def length_is_given(body: Mapping[str, Any]) -> bool:
    """Whether the request says how long a reply may be."""
    return any(body.get(name) is not None for name in _LENGTHS)


def check_fields(body: Mapping[str, Any]) -> None:
    """ApiError for fields that only callers in Python have, and lists of a length that hurts."""
    if body.get("logits_processor") is not None:
        raise refused("logits_processor", "is a function, which a request can't hold")
    for name, most in (
        ("stop", _MOST_STOPS),
        ("stop_token_ids", _MOST_STOPS),
        ("logit_bias", _MOST_BIASES),
    ):
        value = body.get(name)
        if isinstance(value, (list, dict)) and len(value) > most:
            raise ApiError(400, f"{name} must have at most {most} elements", "invalid_value", name)


def list_field(body: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A list of objects, not empty. Raises ValueError, TypeError."""
    value = body.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, list) or not value:
        raise TypeError(f"{name} must be a list that is not empty, not {value!r}")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise TypeError(f"{name}[{i}] must be an object, not {item!r}")
    return value
