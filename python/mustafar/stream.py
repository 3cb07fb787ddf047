"""Text that is made piece by piece."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

from ._core import ChatReply, Generation
from .types import GenerateResult

_Closing = TypeVar("_Closing", bound="Closing")
_Stream = TypeVar("_Stream", bound="TextStream")


class Closing:
    """What a ``with`` block closes at its end."""

    def close(self) -> None:
        """Frees what is held."""
        raise NotImplementedError

    def __enter__(self: _Closing) -> _Closing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class TextStream(Closing):
    """An iterator over pieces of text; what :class:`Stream` and :class:`ChatStream` share."""

    _core: Generation | ChatReply

    def __iter__(self: _Stream) -> _Stream:
        return self

    def __next__(self) -> str:
        while (piece := self._core.step()) is not None:
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the work; nothing more is computed."""
        self._core.stop()

    @property
    def result(self) -> GenerateResult:
        """Text, ids and reason so far, or in all once it has ended."""
        return GenerateResult._of(self._core.result())

    def __repr__(self) -> str:
        result = self.result
        said = f"{len(result.token_ids)} tokens, {result.text!r}"
        return f"<mustafar.{type(self).__name__} of {said}>"

    def _finish(self) -> GenerateResult:
        with self:
            for _ in self:
                pass
        return self.result


class Stream(TextStream):
    """Text of a generation, piece by piece, as it becomes certain.

    Until it ends the session is its own. Closing it (or leaving the ``for`` loop and dropping it)
    ends it, and so does an error, Cancelled among others; tokens made so far stay in the session.
    ``result`` holds what was made, at any time and from any thread; ``close`` may come from any
    thread too.
    """

    def __init__(self, native: Generation) -> None:
        self._core = native


class ChatStream(TextStream):
    """Text of a reply, piece by piece.

    Until it ends the chat is its own. Closing it, or dropping it, ends it, and so does an error;
    what was said stays in the conversation.
    """

    _core: ChatReply

    def __init__(self, native: ChatReply) -> None:
        self._core = native

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the cache held already."""
        return self._core.cached_tokens()
