"""An answer over HTTP, whole or as a stream of events, given up where the client is gone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..openai_shape import Answer, usage
from .errors import ApiError, internal_error
from .service import Job, Service

_T = TypeVar("_T")
_QUEUED_CHUNKS = 64  # of one stream, for a client that reads slowly


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Awaits work, which is cancelled when the client is gone: ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Reply:
    """The answer to a request that the engine has taken.

    Args:
        service: The server's.
        answer: Its shape.
        jobs: Its choices, in order.
        prompt_tokens: Of all its prompts, each counted once.
        with_usage: A stream ends with a chunk that says it.
    """

    def __init__(
        self,
        service: Service,
        answer: Answer,
        jobs: Sequence[Job],
        prompt_tokens: int,
        with_usage: bool,
    ) -> None:
        self._service = service
        self._answer = answer
        self._jobs = jobs
        self._prompt_tokens = prompt_tokens
        self._with_usage = with_usage
        self._arrived = time.perf_counter()

    def _usage(self) -> dict[str, Any]:
        made = sum(len(job.result.token_ids) for job in self._jobs if job.result is not None)
        cached = sum(
            job.result.stats.cached_tokens
            for job in self._jobs
            if job.result is not None and job.first
        )
        return usage(self._prompt_tokens, made, cached)

    def _end(self) -> None:
        self._service.release(self._jobs)
        self._service.metrics.duration.observe(time.perf_counter() - self._arrived)

    async def whole(self, receive: Receive) -> Response:
        """The answer as one object."""
        try:
            work = _all([self._service.finish(job, self._arrived) for job in self._jobs])
            results = await while_connected(receive, work)
        except ClientDisconnect:
            self._service.metrics.disconnects.add()
            raise
        finally:
            self._end()
        choices = [
            job.choice.whole(result) for job, result in zip(self._jobs, results, strict=True)
        ]
        return JSONResponse(self._answer.whole(choices, self._usage()))

    def stream(self, slot: ExitStack) -> Response:
        """The answer as events. slot: closed when the stream ends."""
        return _EventStream(self, slot)

    async def _send_to(self, send: Send) -> None:
        """Sends the events."""

        async def event(data: bytes) -> None:
            body = b"data: " + data + b"\n\n"
            try:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            except OSError:  # how some servers say it
                raise ClientDisconnect from None

        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    await event(_json(chunk))
            if self._with_usage:
                await event(_json(self._answer.last_chunk(self._usage())))
            await event(b"[DONE]")
        except ApiError as error:
            await event(_json(error.body))
        except ClientDisconnect:
            raise
        except Exception:
            await event(_json(internal_error().body))
            raise

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks of all choices, as they come."""
        queue: asyncio.Queue[dict[str, Any] | None | BaseException] = asyncio.Queue(_QUEUED_CHUNKS)
        tasks = [asyncio.ensure_future(self._feed(job, queue.put)) for job in self._jobs]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(
        self, job: Job, put: Callable[[dict[str, Any] | None | BaseException], Awaitable[None]]
    ) -> None:
        try:
            if (opening := job.choice.opening()) is not None:
                await put(opening)
            async with aclosing(self._service.pieces(job, self._arrived)) as pieces:
                async for piece in pieces:
                    for chunk in job.choice.push(piece):
                        await put(chunk)
            assert job.result is not None
            for chunk in job.choice.closing(job.result):
                await put(chunk)
            await put(None)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            await put(error)


class _EventStream(Response):
    """Server-sent events; ends with the client's connection at the latest."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, slot: ExitStack) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._reply = reply
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await while_connected(receive, self._reply._send_to(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientDisconnect:
            self._reply._service.metrics.disconnects.add()
        finally:
            self._reply._end()
            self._slot.close()


async def _all(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Results of all; the first failure ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()
