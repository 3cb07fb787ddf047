"""Tool calls in the text of a reply, in the styles of published models.

``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` of Hermes and Qwen,
``{"name": ..., "parameters": {...}}`` of Llama 3, alone or behind ``<|python_tag|>``,
``[TOOL_CALLS][{"name": ..., "arguments": {...}}]`` or ``[TOOL_CALLS]name[ARGS]{...}`` of Mistral,
and ``[name(key=value), ...]`` of models that write Python. Only tools that were offered are called,
and only by what can be read to its end: everything else is text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# What may stand before a call. Tokenizers that have these as special tokens leave them out of text.
MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_CLOSE = "</tool_call>"
_KEYS = ("name", "type", "function", "parameters", "arguments")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolCallReader:
    """Parts a reply's text into what is said and what is called, also while it is made.

    Args:
        tools: As a request has them: dicts with ``function`` or, as some templates take them, with
            ``name`` itself.
    """

    def __init__(self, tools: Iterable[Mapping[str, Any]]) -> None:
        self._names = frozenset(
            name
            for tool in tools
            if isinstance(name := tool.get("function", tool).get("name"), str)
        )
        self._text = ""
        self._given = 0  # characters that were handed out as text

    def push(self, piece: str) -> str:
        """Takes more of the reply; returns text that is no part of a call, whatever follows."""
        self._text += piece
        safe = max(self._given, self._certain())
        said, self._given = self._text[self._given : safe], safe
        return said

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        said, calls = self._split()
        if not calls:
            said = self._text
        return said[self._given :], calls

    def _certain(self) -> int:
        """How much of the text is certainly none of a call."""
        start = len(self._text) - len(self._text.lstrip())
        if self._may_be_bare(self._text[start:]):
            return 0
        places = [at for mark in MARKS if (at := self._text.find(mark)) >= 0]
        end = min(places, default=len(self._text) - self._begun_mark())
        return len(self._text[:end].rstrip())  # spaces before a call are left out

    def _begun_mark(self) -> int:
        """Length of the longest end of the text that begins a mark."""
        longest = max(map(len, MARKS)) - 1
        for n in range(min(longest, len(self._text)), 0, -1):
            if any(mark.startswith(self._text[-n:]) for mark in MARKS):
                return n
        return 0

    def _may_be_bare(self, text: str) -> bool:
        """Whether a reply that begins so may be a call without a mark."""
        if text.startswith("{"):
            key = re.match(r'\{\s*("\w*"?)?$|\{\s*"(\w+)"', text)
            if key is None:
                return False
            if key[2] is not None:
                return key[2] in _KEYS
            return any(f'"{name}"'.startswith(key[1] or "") for name in _KEYS)
        if text.startswith("["):
            rest = text[1:].lstrip()
            if any(
                (name + "(").startswith(rest) or rest.startswith(name + "(") for name in self._names
            ):
                return True
        return not text

    def _split(self) -> tuple[str, list[ToolCall]]:
        text = self._text
        bare = text.strip()
        if "<tool_call>" in text:
            return self._hermes(text)
        for mark in ("[TOOL_CALLS]", "<|python_tag|>"):
            said, found, rest = text.partition(mark)
            if found:
                read = self._mistral if mark == "[TOOL_CALLS]" else self._llama
                return said.rstrip(), read(rest.strip())
        if bare.startswith("{"):
            return "", self._llama(bare)
        if bare.startswith("["):
            return "", self._pythonic(bare)
        return text, []

    def _hermes(self, text: str) -> tuple[str, list[ToolCall]]:
        said: list[str] = []
        calls: list[ToolCall] = []
        for i, part in enumerate(text.split("<tool_call>")):
            body, closed, rest = part.partition(_CLOSE) if i else ("", "", part)
            call = self._object(_json(body)) if i else None
            # The last one may end with the reply.
            if i and (call is None or (not closed and rest)):
                said.append("<tool_call>" + part)
            else:
                calls += [call] if call else []
                said.append(rest)
        kept = [said[0].rstrip(), *(part.strip() for part in said[1:])]
        return "\n".join(part for part in kept if part), calls

    def _llama(self, text: str) -> list[ToolCall]:
        calls = []
        decoder = json.JSONDecoder()
        while text:
            try:
                value, end = decoder.raw_decode(text)
            except ValueError:
                return []
            call = self._object(value)
            if call is None:
                return []
            calls.append(call)
            text = text[end:].strip().removeprefix(";").strip()
        return calls

    def _mistral(self, text: str) -> list[ToolCall]:
        if text.startswith("["):
            values = _json(text)
            if not isinstance(values, list):
                return []
            calls = [self._object(value) for value in values]
        else:
            calls = []
            for each in text.split("[TOOL_CALLS]"):
                name, _, arguments = each.partition("[ARGS]")
                if not arguments:
                    at = each.find("{")
                    name, arguments = (each[:at], each[at:]) if at >= 0 else (each, "")
                value = {"name": name.strip(), "arguments": _json(arguments)}
                calls.append(self._object(value))
        return [] if None in calls else [call for call in calls if call]

    def _pythonic(self, text: str) -> list[ToolCall]:
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
        if not isinstance(tree, ast.List):
            return []
        calls = []
        for node in tree.elts:
            if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
                return []
            try:
                values = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if k.arg}
                call = self._object({"name": node.func.id, "arguments": values})
            except (ValueError, TypeError):
                return []
            if call is None or len(values) != len(node.keywords):
                return []
            calls.append(call)
        return calls

    def _object(self, value: Any) -> ToolCall | None:
        """A call of {"name": ..., "arguments" or "parameters": {...}}, or of one in "function"."""
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> Any:
    """What a text says as JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
