"""Replies to conversations in the shape of OpenAI's API, and how a conversation is made.

Below :class:`Model`, :class:`Session` and :class:`Chat`, which use it: it works on native objects.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import _core, checks
from ._core import ChatTemplate
from .grammar import NAMES
from .openai_shape import ChatAnswer, ChatChoice, Piece, usage
from .stream import ChatStream
from .types import SamplingParams

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

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
        if not isinstance(options, Mapping):
            raise TypeError(f"stream_options must be a dict, not {options!r}")
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

    def sampling_of(self, index: int) -> SamplingParams:
        """How a choice is sampled: with a seed of its own."""
        if self.sampling.seed is None:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + index) % 2**64)


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
    "system" to models that came before it. Raises ValueError for a part that is no text and a
    message without a role, TypeError for what is no message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of dicts, not {messages!r}")
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}] must be a dict, not {message!r}")
        changed = dict(message)
        if "role" not in changed:
            raise ValueError(f"messages[{i}] has no role")
        if not isinstance(changed["role"], str):
            raise TypeError(f"messages[{i}].role must be a text, not {changed['role']!r}")
        if changed.get("role") == "developer":
            changed["role"] = "system"
        content = changed.get("content")
        if isinstance(content, (list, tuple)):
            changed["content"] = "\n".join(
                _part_text(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)
            )
        elif content is not None and not isinstance(content, str):
            raise TypeError(f"messages[{i}].content must be a text or its parts, not {content!r}")
        plain.append(changed)
    return plain


def plain_tools(tools: Tools | None) -> list[Mapping[str, Any]]:
    """Tool definitions as they are. Raises TypeError for what is none: dicts with a function, which
    has a name, or with a name themselves."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools or [], Iterable):
        raise TypeError(f"tools must be a list of dicts, not {tools!r}")
    plain = list(tools or [])
    for i, tool in enumerate(plain):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TypeError(f"tools[{i}].function must be an object with a name, not {function!r}")
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
    tools = plain_tools(tools) if request.use_tools else None
    chat = native_chat(model, session, tools=tools, chat_template=chat_template)
    read = tools if request.reads_calls else None
    replies = _Replies(model, chat, plain_messages(messages), request, read or ())
    return replies.chunks() if stream else replies.whole()


class _Replies:
    """The choices of one request, one after another: the prompt is computed once."""

    def __init__(
        self,
        model: _core.Model,
        chat: _core.Chat,
        messages: list[dict[str, Any]],
        request: Request,
        tools: Tools,
    ) -> None:
        self._model, self._chat = model, chat
        self._messages, self._request = messages, request
        top = request.top_logprobs if request.logprobs else None
        self._answer = ChatAnswer(model.folder().name, model.tokenizer(), tools, top)
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        if request.n > 1:
            chat.keep_prompts()  # every choice begins with the same state
        self._next = self._begin(0)  # a bad conversation is refused before anything is streamed

    def _begin(self, index: int) -> ChatStream:
        set_messages(self._chat, self._messages)
        sampling = self._request.sampling_of(index)
        continues = self._request.continues
        return ChatStream(start_reply(self._model, self._chat, sampling, continues))

    def _replies(self) -> Iterator[tuple[ChatChoice, ChatStream]]:
        for index in range(self._request.n):
            reply = self._next if index == 0 else self._begin(index)
            with reply:
                yield self._answer.choice(index), reply
            self._count(index, reply)

    def _count(self, index: int, reply: ChatStream) -> None:
        result = reply.result
        if index == 0:
            self._cached_tokens = reply.cached_tokens
            self._prompt_tokens = result.stats.prompt_tokens + reply.cached_tokens
        self._completion_tokens += len(result.token_ids)

    def _usage(self) -> dict[str, Any]:
        return usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def _pieces(self, reply: ChatStream) -> Iterator[Piece]:
        """What is made, step by step; ids and log-probabilities where they are looked at."""
        if not (self._answer.reads_tokens or self._request.logprobs):
            yield from map(Piece, reply)
            return
        seen = 0
        while (text := reply._core.step()) is not None:
            result = reply.result
            yield Piece(text, result.token_ids[seen:], result.logprobs[seen:])
            seen = len(result.token_ids)

    def whole(self) -> dict[str, Any]:
        choices = []
        for choice, reply in self._replies():
            for piece in self._pieces(reply):
                choice.take(piece)
            choices.append(choice.whole(reply.result))
        return self._answer.whole(choices, self._usage())

    def chunks(self) -> Iterator[dict[str, Any]]:
        for choice, reply in self._replies():
            yield choice.opening()
            for piece in self._pieces(reply):
                yield from choice.push(piece)
            yield from choice.closing(reply.result)
        if self._request.with_usage:
            yield self._answer.last_chunk(self._usage())
