"""Answers in the shape of OpenAI's API: of replies to conversations, and of continued texts.

An answer has choices; a choice takes the pieces of a generation as they come, from wherever they
come, and gives chunks of a stream or, at the end, itself as a whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ._core import Tokenizer
from .tool_calls import ToolCall, ToolCallReader
from .types import GenerateResult, TokenLogprob

_FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "stop",
    "timeout": "length",
}


class Piece(NamedTuple):
    """What a step of a generation made: text that is certain by now, ids, and their entries."""

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """The ``usage`` of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Answer:
    """What the choices and chunks of one answer have in common."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model_name: str) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, choices: Sequence[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        """The answer, not streamed."""
        return {**self._head, "object": self.kind, "choices": list(choices), "usage": used}

    def last_chunk(self, used: dict[str, Any]) -> dict[str, Any]:
        """What ends a stream that was asked for its usage."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": used}

    def chunk(self, **choice: Any) -> dict[str, Any]:
        """A chunk with a part of one choice."""
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}


class ChatAnswer(Answer):
    """The answer to a conversation.

    Args:
        model_name: What it says of the model.
        tokenizer: The model's.
        tools: Those that the reply may call.
        top_logprobs: How many alternatives a token's entry has; None for no entries.
    """

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        model_name: str,
        tokenizer: Tokenizer,
        tools: Iterable[Mapping[str, Any]] = (),
        top_logprobs: int | None = None,
    ) -> None:
        super().__init__(model_name)
        self.tokenizer = tokenizer
        self.tools = list(tools)
        self.top_logprobs = top_logprobs
        # Whether pieces need their tokens; with log-probabilities they do, too.
        self.reads_tokens = ToolCallReader(self.tools, tokenizer).reads_tokens

    def choice(self, index: int) -> ChatChoice:
        """A choice that takes pieces."""
        return ChatChoice(self, index)

    def logprobs(self, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        """Entries as a choice or a chunk has them."""
        if self.top_logprobs is None:
            return None
        return {"content": [self._logprob(entry, self.top_logprobs) for entry in entries]}

    def _logprob(self, entry: TokenLogprob, top: int) -> dict[str, Any]:
        ranked = _ranked(entry)[:top]
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(*pair) for pair in ranked],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id])
        # A part of a character has no bytes that could be told from its text.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": data}


class ChatChoice:
    """A reply that is being made.

    For a stream: :meth:`opening`, :meth:`push` with every piece, :meth:`closing`. Otherwise
    :meth:`take` every piece, then :meth:`whole`.
    """

    def __init__(self, answer: ChatAnswer, index: int) -> None:
        self._answer = answer
        self._index = index
        self._reader = ToolCallReader(answer.tools, answer.tokenizer)
        self._said: list[str] = []
        self._held: list[TokenLogprob] = []  # of tokens whose text is not certain yet
        self._sent = 0  # entries of the log-probabilities

    def take(self, piece: Piece) -> str:
        """Takes a piece; returns text that is certainly none of a call."""
        self._held += piece.logprobs
        if not self._answer.tools:
            return piece.text
        text = self._reader.push(piece.text, piece.token_ids)
        self._said.append(text)
        return text

    def _chunk(
        self,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return self._answer.chunk(
            index=self._index, delta=delta, finish_reason=reason, logprobs=logprobs
        )

    def _entries(self) -> dict[str, Any] | None:
        held, self._held = self._held, []
        self._sent += len(held)
        return self._answer.logprobs(held)

    def opening(self) -> dict[str, Any]:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """Takes a piece; the chunks that can be sent now, none or one."""
        text = self.take(piece)
        return [self._chunk({"content": text}, self._entries())] if text else []

    def closing(self, result: GenerateResult) -> list[dict[str, Any]]:
        """The last chunks: what was held back, calls, why it ended."""
        rest, calls = self._reader.finish()
        del self._held[max(len(result.logprobs) - self._sent, 0) :]  # a stop text's
        chunks = []
        if rest:
            chunks.append(self._chunk({"content": rest}))
        for i, call in enumerate(_in_openai_shape(calls)):
            chunks.append(self._chunk({"tool_calls": [{"index": i, **call}]}))
        chunks.append(self._chunk({}, self._entries(), _reason(result, calls)))
        return chunks

    def whole(self, result: GenerateResult) -> dict[str, Any]:
        """The choice, not streamed."""
        rest, calls = self._reader.finish()
        message: dict[str, Any] = {"role": "assistant", "content": result.text}
        if calls:
            message["content"] = "".join(self._said) + rest or None
            message["tool_calls"] = _in_openai_shape(calls)
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._answer.logprobs(result.logprobs),
            "finish_reason": _reason(result, calls),
        }


class TextAnswer(Answer):
    """Continued texts, as the older ``/v1/completions`` has them.

    Args:
        model_name: What it says of the model.
        tokenizer: The model's.
        top_logprobs: How many alternatives a token has; None for no log-probabilities.
    """

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, model_name: str, tokenizer: Tokenizer, top_logprobs: int | None = None
    ) -> None:
        super().__init__(model_name)
        self.tokenizer = tokenizer
        self.top_logprobs = top_logprobs

    def choice(self, index: int, prompt: Sequence[int]) -> TextChoice:
        """A choice that takes pieces. prompt: ids of what is continued."""
        return TextChoice(self, index, prompt)


class TextChoice:
    """A text that is being continued; used as :class:`ChatChoice` is."""

    def __init__(self, answer: TextAnswer, index: int, prompt: Sequence[int]) -> None:
        self._answer = answer
        self._index = index
        self._held: list[TokenLogprob] = []
        self._sent = 0
        self._decoder = answer.tokenizer.stream(skip_special=True, after=list(prompt))
        self._offset = 0  # characters of the tokens so far

    def opening(self) -> None:
        """There is no first chunk."""
        return None

    def take(self, piece: Piece) -> str:
        """Takes a piece; returns its text."""
        self._held += piece.logprobs
        return piece.text

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """Takes a piece; the chunks that can be sent now, none or one."""
        text = self.take(piece)
        return [self._chunk(text, None)] if text else []

    def closing(self, result: GenerateResult) -> list[dict[str, Any]]:
        """The last chunk: why it ended."""
        del self._held[max(len(result.logprobs) - self._sent, 0) :]  # a stop text's
        return [self._chunk("", _reason(result, ()))]

    def _chunk(self, text: str, reason: str | None) -> dict[str, Any]:
        return self._answer.chunk(
            index=self._index, text=text, finish_reason=reason, logprobs=self._logprobs()
        )

    def whole(self, result: GenerateResult) -> dict[str, Any]:
        """The choice, not streamed."""
        return {
            "index": self._index,
            "text": result.text,
            "logprobs": self._logprobs(),
            "finish_reason": _reason(result, ()),
        }

    def _logprobs(self) -> dict[str, Any] | None:
        top = self._answer.top_logprobs
        held, self._held = self._held, []
        self._sent += len(held)
        if top is None:
            return None
        decode = self._answer.tokenizer.decode
        offsets = []
        for entry in held:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(entry.token_id))
        return {
            "tokens": [decode([entry.token_id]) for entry in held],
            "token_logprobs": [entry.logprob for entry in held],
            "top_logprobs": [
                {decode([id]): logprob for id, logprob in _ranked(entry)[:top]} for entry in held
            ],
            "text_offset": offsets,
        }


Choice = ChatChoice | TextChoice


def _ranked(entry: TokenLogprob) -> list[tuple[int, float]]:
    return sorted(entry.top.items(), key=lambda item: -item[1])


def _reason(result: GenerateResult, calls: Sequence[ToolCall]) -> str:
    return "tool_calls" if calls else _FINISH_REASONS[result.finish_reason]


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
