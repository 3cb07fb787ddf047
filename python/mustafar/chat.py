"""Conversations: messages, the prompt that a chat template makes of them, and a session's cache."""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from . import _core
from ._core import ChatTemplate
from .model import Model
from .session import Session
from .types import GenerateResult, KVConfig, SamplingParams

Message = Mapping[str, Any]


class ChatStream:
    """Text of a reply, piece by piece.

    Closing it, or dropping it, ends the work; what was said stays in the conversation.
    """

    def __init__(self, native: _core.ChatReply) -> None:
        self._core = native

    def __iter__(self) -> ChatStream:
        return self

    def __next__(self) -> str:
        while (piece := self._core.step()) is not None:
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the reply; nothing more is computed."""
        self._core.stop()

    @property
    def result(self) -> GenerateResult:
        """Text, ids and reason so far, or in all once it has ended."""
        return GenerateResult._of(self._core.result())

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the cache held already."""
        return self._core.cached_tokens()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Chat:
    """A conversation over one session.

    Every turn appends to the session's cache: what is cached is not computed again. A special token
    that a message spells is text; only the template makes special tokens.

    Args:
        session: A :class:`Session`; or a :class:`Model`, a folder or None (the demo model), for
            which a session is made.
        system: System message.
        tools: Tool definitions, passed to the template.
        chat_template: A template, or its name or file as ``--chat-template`` takes it; None is the
            model folder's.
        kv: How the cache is kept, where a session is made.
        max_tokens: Its context limit, where a session is made.
        date: What the template's ``strftime_now`` prints; None is the time of this call.
        context_shift: Drop whole oldest turns when a prompt exceeds the context.
        variables: Further variables of the template.

    Raises:
        TemplateError: The model has no template, or it does not parse.
        TokenizerError: The model has no tokenizer.
    """

    def __init__(
        self,
        session: Session | Model | str | os.PathLike[str] | None = None,
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: ChatTemplate | str | os.PathLike[str] | None = None,
        kv: KVConfig | None = None,
        max_tokens: int | None = None,
        date: str | datetime.date | None = None,
        context_shift: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(session, Session):
            if kv is not None or max_tokens is not None:
                raise ValueError("kv and max_tokens belong to the session that is given")
        else:
            session = Session(session, kv=kv, max_tokens=max_tokens)
        self._session = session
        if isinstance(chat_template, (str, os.PathLike)):
            folder = session.model.folder
            chat_template = ChatTemplate.from_argument(os.fspath(chat_template), folder)
        self._core = _core.Chat(
            session._core,
            chat_template,
            system,
            json.dumps(list(tools)) if tools else "",
            json.dumps(dict(variables)) if variables else "",
            date.isoformat() if isinstance(date, datetime.date) else date,
            context_shift,
        )

    @property
    def session(self) -> Session:
        """The session; between two turns it may be used, and the next turn puts it right."""
        return self._session

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, a copy. Assign a list of messages to replace it."""
        messages: list[dict[str, Any]] = json.loads(self._core.messages_json())
        return messages

    @messages.setter
    def messages(self, messages: Sequence[Message]) -> None:
        self._core.set_messages_json(json.dumps(list(messages)))

    def add(self, message: Message) -> None:
        """Adds a message, such as a tool's result, without replying."""
        self.messages = [*self.messages, message]

    def send(
        self, text: str, params: SamplingParams | None = None, **sampling: Any
    ) -> GenerateResult:
        """Adds a user message and the reply to it.

        Args:
            text: The message.
            params: Sampling parameters; keyword arguments of :class:`SamplingParams` on top.

        Raises:
            ContextOverflow: The conversation does not fit the context; it is as before.
            TemplateError: The template refuses the conversation; it is as before.
        """
        return _finish(self.stream(text, params, **sampling))

    def stream(
        self, text: str, params: SamplingParams | None = None, **sampling: Any
    ) -> ChatStream:
        """As :meth:`send`, handing out text as it is made."""
        native = SamplingParams.merge(params, sampling)._native()
        return ChatStream(self._core.start(text, native))

    def reply(self, params: SamplingParams | None = None, **sampling: Any) -> GenerateResult:
        """Replies to the messages as they stand, after :meth:`add` for example."""
        native = SamplingParams.merge(params, sampling)._native()
        return _finish(ChatStream(self._core.reply(native)))

    def stream_reply(self, params: SamplingParams | None = None, **sampling: Any) -> ChatStream:
        """As :meth:`reply`, handing out text as it is made."""
        return ChatStream(self._core.reply(SamplingParams.merge(params, sampling)._native()))

    def regenerate(self, params: SamplingParams | None = None, **sampling: Any) -> GenerateResult:
        """Makes the last reply again; ValueError where there is none."""
        native = SamplingParams.merge(params, sampling)._native()
        return _finish(ChatStream(self._core.regenerate(native)))

    def undo(self) -> str | None:
        """Drops the last user message and all after it; returns its text."""
        return self._core.undo()

    def clear(self) -> None:
        """Drops all messages but the system message."""
        self._core.clear()

    def set_system(self, text: str | None) -> None:
        """Sets, or removes, the system message."""
        self._core.set_system(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation as JSON, and the cache beside it as ``path`` + ``.cache``."""
        self._core.save(os.fspath(path))

    def load(self, path: str | os.PathLike[str]) -> bool:
        """Reads what :meth:`save` wrote.

        Returns:
            Whether the cache could be used; one that is missing, damaged, or of another model or
            configuration can't, and the next turn computes it anew.
        """
        return self._core.load(os.fspath(path))

    def prompt_tokens(self) -> list[int]:
        """Ids of the next prompt: the messages and what starts a reply."""
        return self._core.prompt_tokens()

    @property
    def end_tokens(self) -> list[int]:
        """Every id that ends a reply."""
        return self._core.end_tokens()

    @property
    def dropped_turns(self) -> int:
        """Turns that ``context_shift`` has dropped."""
        return self._core.dropped_turns()


def _finish(stream: ChatStream) -> GenerateResult:
    try:
        for _ in stream:
            pass
    finally:
        stream.close()
    return stream.result


_FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "stop",
}

_RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


def chat_completion(
    model: Model,
    messages: Sequence[Message],
    *,
    stream: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: ChatTemplate | str | os.PathLike[str] | None = None,
    kv: KVConfig | None = None,
    session: Session | None = None,
    params: SamplingParams | None = None,
    **sampling: Any,
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """See :meth:`Model.chat_completion`."""
    for theirs, ours in _RENAMED.items():
        if theirs in sampling:
            sampling[ours] = sampling.pop(theirs)
    if sampling.get("stop") is None:
        sampling.pop("stop", None)
    native = SamplingParams.merge(params, sampling)._native()
    chat = Chat(
        session if session is not None else Session(model, kv=kv),
        tools=tools,
        chat_template=chat_template,
    )
    chat.messages = messages
    reply = ChatStream(chat._core.reply(native))
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model.folder.name,
    }
    if stream:
        return _chunks(reply, head)
    result = _finish(reply)
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
