"""Conversations: messages, the prompt that a chat template makes of them, and a session's cache."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ._core import ChatTemplate
from .completion import Message, Tools, native_chat, set_messages, start_reply
from .model import Model
from .session import Session
from .stream import ChatStream
from .types import GenerateResult, KVConfig, SamplingParams


class Chat:
    """A conversation over one session.

    Every turn appends to the session's cache: what is cached is not computed again. A special token
    that a message spells is text; only the template makes special tokens. The arguments of a tool
    call may be an object or, as OpenAI's API gives them, JSON text; a template sees the object.

    One call at a time, as for a :class:`Session`; while a reply is streamed, none but reading
    ``messages`` and ``cancel()``. A call that raises before a reply has begun leaves the
    conversation as it was; of a reply that breaks off, what was said stays.

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
        tools: Tools | None = None,
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
        self._core = native_chat(
            session._model._core,
            session._core,
            system=system,
            tools=tools,
            chat_template=chat_template,
            date=date,
            context_shift=context_shift,
            variables=variables,
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
        set_messages(self._core, messages)

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
        return self.stream(text, params, **sampling)._finish()

    def stream(
        self, text: str, params: SamplingParams | None = None, **sampling: Any
    ) -> ChatStream:
        """As :meth:`send`, handing out text as it is made."""
        native = SamplingParams.merge(params, sampling)._native(self._session._model._core)
        return ChatStream(self._core.start(text, native))

    def reply(
        self,
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        **sampling: Any,
    ) -> GenerateResult:
        """Replies to the messages as they stand, after :meth:`add` for example.

        Args:
            params: As :meth:`send` takes them.
            continue_final_message: Go on inside the last message, which the assistant began: what
                is made becomes a part of it, and the result holds that alone.

        Raises:
            ValueError: ``continue_final_message`` where the last message is not a text of the
                assistant's, or the template leaves it out.
        """
        return self.stream_reply(
            params, continue_final_message=continue_final_message, **sampling
        )._finish()

    def stream_reply(
        self,
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        **sampling: Any,
    ) -> ChatStream:
        """As :meth:`reply`, handing out text as it is made."""
        merged = SamplingParams.merge(params, sampling)
        return ChatStream(
            start_reply(self._session._model._core, self._core, merged, continue_final_message)
        )

    def regenerate(self, params: SamplingParams | None = None, **sampling: Any) -> GenerateResult:
        """Makes the last reply again; ValueError where there is none."""
        native = SamplingParams.merge(params, sampling)._native(self._session._model._core)
        return ChatStream(self._core.regenerate(native))._finish()

    def fork(self) -> Chat:
        """The same conversation once more; what is said in one is not said in the other.

        The cache is shared as far as :meth:`Session.fork` shares it.
        """
        chat = Chat.__new__(Chat)
        chat._session = self._session.fork()
        chat._core = self._core.fork(chat._session._core)
        return chat

    def cancel(self) -> None:
        """Makes the reply that another thread waits for raise :class:`Cancelled` soon.

        What was said by then stays in the conversation. Where no reply is made nothing happens.
        """
        self._core.cancel()

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

    def prompt_tokens(self, *, continue_final_message: bool = False) -> list[int]:
        """Ids of the next prompt: the messages and what starts a reply.

        Args:
            continue_final_message: The prompt of a reply that goes on inside the last message;
                ValueError where :meth:`reply` would raise it.
        """
        return self._core.prompt_tokens(continue_final_message)

    @property
    def end_tokens(self) -> list[int]:
        """Every id that ends a reply."""
        return self._core.end_tokens()

    @property
    def dropped_turns(self) -> int:
        """Turns that ``context_shift`` has dropped."""
        return self._core.dropped_turns()

    def __repr__(self) -> str:
        return f"<mustafar.Chat of {len(self.messages)} messages in {self._session!r}>"
