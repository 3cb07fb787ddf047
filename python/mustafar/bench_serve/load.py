"""Sends requests and takes down when their tokens come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .http import Address, Answer, HttpError, ask
from .prompts import Prompt

_LONGEST_ERROR = 200  # characters
_REFUSED = (429, 503)  # by a server that has enough to do


@dataclass
class Record:
    """What became of a request. Times are of time.perf_counter().

    Attributes:
        due: When it should begin: its arrival, or when its client was free.
        pieces: When each piece of text came.
        ended: When nothing more came.
        prompt_tokens, output_tokens: As the server counts them; without that, as the client does,
            a piece of text for a token.
        counted: Whether the server has counted.
        outcome: "ok", "refused" or "failed".
        error: What was wrong.
    """

    due: float
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    outcome: str = "failed"
    error: str = ""


@dataclass(frozen=True)
class Sender:
    """How a prompt becomes a request.

    Attributes:
        address: The server.
        model: Its name for the model.
        chat: Whether prompts are messages of conversations.
        fields: Of every request's body, beside the prompt and its length. None leaves one out.
        timeout: Seconds that a request may take.
    """

    address: Address
    model: str
    chat: bool
    fields: Mapping[str, Any]
    timeout: float

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """What is sent."""
        said: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt.text}]}
            if self.chat
            else {"prompt": prompt.text}
        )
        usual = {
            "model": self.model,
            "max_tokens": prompt.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "temperature": 0,
        }
        return {k: v for k, v in {**usual, **self.fields, **said}.items() if v is not None}

    async def send(self, prompt: Prompt, due: float) -> Record:
        """Sends a request and reads its reply; what goes wrong stands in the record."""
        record = Record(due, prompt_tokens=prompt.tokens)
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        body = self.body(prompt)
        record.sent = time.perf_counter()
        try:
            await asyncio.wait_for(self._exchange(path, body, record), self.timeout)
        except asyncio.TimeoutError:
            record.error = f"it took longer than {self.timeout:g} s"
        except (OSError, HttpError) as error:
            record.error = str(error)
        record.ended = time.perf_counter()
        return record

    async def _exchange(self, path: str, body: dict[str, Any], record: Record) -> None:
        async with ask(self.address, "POST", path, body) as answer:
            await _read(answer, record)


async def _read(answer: Answer, record: Record) -> None:
    if answer.status != 200:
        if answer.status in _REFUSED:
            record.outcome = "refused"
        record.error = f"{answer.status} {_said_of(await answer.json())}"
        return
    complete = False
    async for data in answer.events():
        if data == b"[DONE]":
            complete = True
            continue
        event = _object_of(data)
        if "error" in event:
            record.error = _said_of(event)
            return
        try:
            complete = _take(event, answer.came, record) or complete
        except (AttributeError, KeyError, TypeError):
            raise HttpError(f"an event is none of a completion: {data[:200]!r}") from None
    if not complete:
        raise HttpError("the stream ended before the reply did")
    if not record.pieces:  # tokens that have no text
        record.pieces.append(answer.came)
    if not record.counted:
        record.output_tokens = len(record.pieces)
    record.outcome = "ok"


def _take(event: dict[str, Any], came: float, record: Record) -> bool:
    """Takes down what an event says; returns whether it ends the reply."""
    ends = False
    for choice in event.get("choices") or ():
        if _has_text(choice):
            record.pieces.append(came)
        ends = ends or choice.get("finish_reason") is not None
    if usage := event.get("usage"):
        record.prompt_tokens = int(usage["prompt_tokens"])
        record.output_tokens = int(usage["completion_tokens"])
        record.counted = True
    return ends


def _object_of(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise HttpError(f"an event is no JSON object: {data[:200]!r}")
    return event


def _has_text(choice: Mapping[str, Any]) -> bool:
    said = choice.get("delta") or choice
    return any(said.get(name) for name in ("text", "content", "reasoning_content", "tool_calls"))


def _said_of(body: Any) -> str:
    """What an error says: its code and message."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        parts = [str(error[name]) for name in ("code", "message") if error.get(name)]
        error = ": ".join(parts) or error
    return str(error)[:_LONGEST_ERROR]


async def open_loop(
    sender: Sender, prompts: Sequence[Prompt], offsets: Sequence[float]
) -> list[Record]:
    """Sends every request at its time, however many are still running.

    offsets: seconds from now, ascending.
    """
    start = time.perf_counter()
    tasks = []
    for prompt, offset in zip(prompts, offsets, strict=True):
        due = start + offset
        await asyncio.sleep(due - time.perf_counter())
        tasks.append(asyncio.create_task(sender.send(prompt, due)))
    return await asyncio.gather(*tasks)


async def closed_loop(sender: Sender, prompts: Sequence[Prompt], clients: int) -> list[Record]:
    """Sends requests from clients that each wait for a reply before they send the next one."""
    left = iter(prompts)
    records: list[Record] = []

    async def client() -> None:
        for prompt in left:
            records.append(await sender.send(prompt, time.perf_counter()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return records
