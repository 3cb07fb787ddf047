"""Tool calls in the text of a reply, in the styles of published models.

``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` of Hermes and Qwen,
``{"name": ..., "parameters": {...}}`` of Llama 3, alone or behind ``<|python_tag|>``,
``[TOOL_CALLS][{"name": ..., "arguments": {...}}]`` or ``[TOOL_CALLS]name[ARGS]{...}`` of Mistral,
and ``[name(key=value), ...]`` of models that write Python. Only tools that were offered are called,
and only by what can be read to its end: everything else is text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import _core


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
        tokenizer: Where it has what stands before calls as special tokens, which have no text in a
            reply, they are known by their ids.
    """

    def __init__(
        self, tools: Iterable[Mapping[str, Any]], tokenizer: _core.Tokenizer | None = None
    ) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        names = [{"name": function.get("name")} for function in functions]
        self._core = _core.ToolCallReader(json.dumps(names), tokenizer)

    @property
    def reads_tokens(self) -> bool:
        """Whether :meth:`push` looks at tokens."""
        return self._core.reads_tokens

    def push(self, piece: str, token_ids: Sequence[int] = ()) -> str:
        """Takes more of the reply, and the tokens that made it (looked at for marks alone).

        Returns:
            Text that is no part of a call, whatever follows.
        """
        return self._core.push(piece, token_ids)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        text, calls = self._core.finish()
        return text, [ToolCall(name, arguments) for name, arguments in calls]
