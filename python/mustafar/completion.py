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
from dataclasses import dataclass, replace
from typing import Any

from . import _core, checks
from ._core import ChatTemplate
from .grammar import NAMES
from .stream import ChatStream
from .tool_calls import MARKS, ToolCall, ToolCallReader
from .types import SamplingParams, TokenLogprob

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

_FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "stop",
    "timeout": "stop",
}

# What clients send about themselves, or to choose among servers: nothing here depends on it.
_WITHOUT_EFFECT = frozenset(
    "model user metadata store service_tier safety_identifier prompt_cache_key"
    " prompt_cache_retention parallel_tool_calls".split()
)
_FORMAT_FIELDS = {
    "text": ("type",),
    "json_object": ("type",),
    "json_schema": ("type", "json_schema"),
}
_MOST_CHOICES = 128
_MOST_TOP_LOGPROBS = 20


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


def start_reply(
    model: _core.Model, chat: _core.Chat, sampling: SamplingParams, continue_final_message: bool
) -> _core.ChatReply:
    """A reply to the messages of a conversation, or one that goes on inside the last."""
    start = chat.continue_last if continue_final_message else chat.reply
    return start(sampling._native(model))


@dataclass(frozen=True)
class Request:
    """What a request of OpenAI's shape asks for, but for its messages and tools."""

    sampling: SamplingParams
    n: int
    logprobs: bool
    top_logprobs: int
    with_usage: bool  # of a stream: a last chunk that says it
    use_tools: bool
    reads_calls: bool  # in what is said; not where it has a format to follow
    continues: bool  # the last message, rather than making one of its own

    @staticmethod
    def of(params: SamplingParams | None, fields: Mapping[str, Any]) -> Request:
        """Reads the fields. None means a field's default.

        Raises TypeError for fields that are not known and values of the wrong kind, ValueError for
        values that are not served, naming the field.
        """
        given = {k: v for k, v in fields.items() if v is not None and k not in _WITHOUT_EFFECT}
        n = checks.integer("n", given.pop("n", 1), 1, _MOST_CHOICES)

        logprobs = given.pop("logprobs", False)
        top = checks.integer("top_logprobs", given.pop("top_logprobs", 0), 0, _MOST_TOP_LOGPROBS)
        if not isinstance(logprobs, bool):  # the number of alternatives, as SamplingParams has it
            logprobs, top = True, checks.integer("logprobs", logprobs, 0, _MOST_TOP_LOGPROBS)
        if top > 0 and not logprobs:
            raise ValueError("top_logprobs needs logprobs=True")
        if logprobs:
            given["logprobs"] = top

        for name in ("max_tokens", "max_completion_tokens"):  # the newer name counts
            if name in given:
                given["max_new_tokens"] = checks.integer(name, given.pop(name), 0)
        schema = _format_schema(given.pop("response_format", None))
        if schema is not None:
            for name in NAMES:
                if name in given:
                    raise ValueError(f"response_format and {name} can't both be given")
            given["json_schema"] = schema
        tool_choice = given.pop("tool_choice", "auto")
        if tool_choice not in ("auto", "none"):
            raise ValueError(f'tool_choice must be "auto" or "none", not {tool_choice!r}')
        options = given.pop("stream_options", {})
        continues = checks.flag(
            "continue_final_message", given.pop("continue_final_message", False)
        )
        prompts = checks.flag(
            "add_generation_prompt", given.pop("add_generation_prompt", not continues)
        )
        if prompts == continues:
            raise ValueError(
                "add_generation_prompt must be the opposite of continue_final_message: "
                f"both are {prompts}"
            )
        return Request(
            sampling=SamplingParams.merge(params, given),
            n=n,
            logprobs=logprobs,
            top_logprobs=top,
            with_usage=bool(options.get("include_usage")),
            use_tools=tool_choice == "auto",
            reads_calls=schema is None,
            continues=continues,
        )


def _format_schema(response_format: Any) -> Any:
    """The schema that a ``response_format`` asks for; None where any text will do."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise TypeError(f"response_format must be a dict, not {response_format!r}")
    kind = response_format.get("type")
    if kind not in _FORMAT_FIELDS:
        kinds = ", ".join(f'"{known}"' for known in _FORMAT_FIELDS)
        raise ValueError(f"response_format.type must be one of {kinds}, not {kind!r}")
    for name in response_format:
        if name not in _FORMAT_FIELDS[kind]:
            raise ValueError(f"response_format has no field {name!r} where its type is {kind!r}")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    named = response_format.get("json_schema")
    if not isinstance(named, Mapping) or not isinstance(named.get("schema"), Mapping):
        raise ValueError(
            f"response_format.json_schema must be a dict with a dict named schema, not {named!r}"
        )
    return named["schema"]


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates for text expect them.

    Content in parts becomes one text, the parts' texts joined by newlines; the role "developer" is
    "system" to models that came before it. Raises ValueError for a part that is no text.
    """
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}] must be a dict, not {message!r}")
        changed = dict(message)
        if changed.get("role") == "developer":
            changed["role"] = "system"
        if isinstance(changed.get("content"), (list, tuple)):
            changed["content"] = "\n".join(
                _part_text(part, f"messages[{i}].content[{j}]")
                for j, part in enumerate(changed["content"])
            )
        plain.append(changed)
    return plain


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text":
        if isinstance(part.get("text"), str):
            return str(part["text"])
        raise TypeError(f"{where}.text must be a text, not {part.get('text')!r}")
    raise ValueError(f'{where} must be of type "text", not {part!r}')


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
    request = Request.of(params, sampling)
    if not request.use_tools:
        tools = None
    chat = native_chat(model, session, tools=tools, chat_template=chat_template)
    read = tools if request.reads_calls else None
    answers = _Answers(model, chat, plain_messages(messages), request, read or ())
    return answers.chunks() if stream else answers.whole()


class _Answers:
    """The choices of one request, one after another: the prompt is computed once."""

    def __init__(
        self,
        model: _core.Model,
        chat: _core.Chat,
        messages: list[dict[str, Any]],
        request: Request,
        tools: Tools,
    ) -> None:
        self._model, self._chat, self._messages, self._request = model, chat, messages, request
        self._tools = list(tools)
        self._marks = self._special_marks() if self._tools else {}
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.folder().name,
        }
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._next = self._begin(0)  # a bad conversation is refused before anything is streamed

    def _begin(self, index: int) -> ChatStream:
        sampling = self._request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + index) % 2**64)
        set_messages(self._chat, self._messages)
        continues = self._request.continues
        return ChatStream(start_reply(self._model, self._chat, sampling, continues))

    def _replies(self) -> Iterator[tuple[int, ChatStream]]:
        for index in range(self._request.n):
            reply = self._next if index == 0 else self._begin(index)
            with reply:
                yield index, reply
            self._count(index, reply)

    def _count(self, index: int, reply: ChatStream) -> None:
        result = reply.result
        if index == 0:
            self._cached_tokens = reply.cached_tokens
            self._prompt_tokens = result.stats.prompt_tokens + reply.cached_tokens
        self._completion_tokens += len(result.token_ids)

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return {"content": [self._logprob(entry) for entry in entries]}

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        ranked = sorted(entry.top.items(), key=lambda item: -item[1])
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(*pair) for pair in ranked[: self._request.top_logprobs]],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._model.tokenizer().decode([token_id])
        # A part of a character has no bytes that could be told from its text.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": data}

    def _special_marks(self) -> dict[int, str]:
        """What stands before tool calls and, being a special token, has no text."""
        tokenizer = self._model.tokenizer()
        ids = {mark: tokenizer.token_to_id(mark) for mark in MARKS}
        return {id: mark for mark, id in ids.items() if id is not None and tokenizer.is_special(id)}

    def _marked(self, reply: ChatStream) -> Iterator[str]:
        """The reply's text, the marks of calls included that have none."""
        if not self._marks:
            yield from reply
            return
        seen = 0
        while (piece := reply._core.step()) is not None:
            ids = reply.result.token_ids[seen:]
            seen += len(ids)
            yield piece + "".join(self._marks.get(id, "") for id in ids)

    def _without_marks(self, text: str) -> str:
        for mark in self._marks.values():
            text = text.replace(mark, "")
        return text

    def _reason(self, finish_reason: str, calls: list[ToolCall]) -> str:
        return "tool_calls" if calls else _FINISH_REASONS[finish_reason]

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, reply in self._replies():
            reader = ToolCallReader(self._tools)
            said = "".join(map(reader.push, self._marked(reply))) if self._tools else ""
            result = reply._finish()
            rest, calls = reader.finish()
            message: dict[str, Any] = {"role": "assistant", "content": result.text}
            if calls:
                text = self._without_marks(said + rest)
                message["content"] = text or None
                message["tool_calls"] = _in_openai_shape(calls)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(result.logprobs),
                    "finish_reason": self._reason(result.finish_reason, calls),
                }
            )
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self._usage()}

    def chunks(self) -> Iterator[dict[str, Any]]:
        head = {**self._head, "object": "chat.completion.chunk"}

        def chunk(
            index: int,
            delta: dict[str, Any],
            reason: str | None = None,
            logprobs: dict[str, Any] | None = None,
        ) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            return {**head, "choices": [choice]}

        for index, reply in self._replies():
            said = 0  # entries of the log-probabilities
            reader = ToolCallReader(self._tools)
            yield chunk(index, {"role": "assistant", "content": ""})
            for piece in self._marked(reply) if self._tools else reply:
                text = self._without_marks(reader.push(piece)) if self._tools else piece
                if not text:
                    continue
                entries = reply.result.logprobs if self._request.logprobs else []
                yield chunk(index, {"content": text}, logprobs=self._logprobs(entries[said:]))
                said = len(entries)
            rest, calls = reader.finish()
            if text := self._without_marks(rest):
                yield chunk(index, {"content": text})
            for i, call in enumerate(_in_openai_shape(calls)):
                yield chunk(index, {"tool_calls": [{"index": i, **call}]})
            result = reply.result
            last = self._logprobs(result.logprobs[said:])
            yield chunk(index, {}, self._reason(result.finish_reason, calls), last)
        if self._request.with_usage:
            yield {**head, "choices": [], "usage": self._usage()}


def _in_openai_shape(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as ``tool_calls`` of a message has them."""
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]
