"""A process that holds the model and answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray import serve
from starlette.types import Message

from .._core import OutOfMemory, QueueFull
from ..engine import Engine
from ..model import Model
from ..server.app import create_app
from .call import Call
from .options import Options

REPLICA_HEADER = "x-mustafar-replica"

_QUEUED_MESSAGES = 64  # of one answer, where the gate reads slowly
_PROBE_SECONDS = 5.0


class Replica:
    """The model, its engine and the server's application, without a socket.

    Raises what Model and Engine do, which Ray shows as the reason of a failed deployment.
    """

    def __init__(self, options: Options) -> None:
        logging.getLogger("mustafar.server").setLevel(logging.INFO)
        self._model = Model(
            options.model,
            options.device,
            options.dtype,  # type: ignore[arg-type]  # which Model checks
            options.threads or max(1, int(options.cpus)),
            weights=options.weights,  # type: ignore[arg-type]
            kv_budget=options.kv_budget or None,
        )
        self._engine = Engine(self._model, options.cache(), **options.engine)
        # Keys and hosts are the gate's: nobody else reaches this process.
        settings = replace(options.limits(), api_keys=(), allowed_hosts=())
        self._app = create_app(self._engine, settings)
        self._name = serve.get_replica_context().replica_tag
        self._finished = 0  # requests of the engine, when its health was looked at last

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """The answer to a request, as messages of ASGI. Ends the request where it is left."""
        queue: asyncio.Queue[Message | Exception | None] = asyncio.Queue(_QUEUED_MESSAGES)

        async def run() -> None:
            try:
                await self._app(_scope(call), _receiver(call), queue.put)
            except Exception as error:
                await queue.put(error)
            else:
                await queue.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await queue.get()) is not None:
                if isinstance(message, Exception):
                    raise message
                if message["type"] == "http.response.start":
                    named = (REPLICA_HEADER.encode(), self._name.encode())
                    message = {**message, "headers": [*message["headers"], named]}
                yield message
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def whole(self, call: Call) -> tuple[str, int, bytes]:
        """The answer to a request at once: this replica's name, the status, the body."""
        status, body = 0, b""
        async with aclosing(self.answer(call)) as messages:
            async for message in messages:
                status = message.get("status", status)
                body += message.get("body", b"")
        return self._name, status, body

    async def check_health(self) -> None:
        """Asks for a token where no request has ended since the last time; Ray calls it.

        Raises what the engine does, as StateError where it is closed, DeviceError or ModelError
        where nothing can be computed any more: then Ray starts another process. One that is only
        busy is well.
        """
        finished = self._engine.stats().finished
        if finished != self._finished:
            self._finished = finished
            return
        try:
            await self._engine.generate(
                [0], max_new_tokens=1, priority=1, timeout=_PROBE_SECONDS, ignore_eos=True
            )
        except (QueueFull, OutOfMemory):
            return
        self._finished = self._engine.stats().finished

    def __del__(self) -> None:
        """Ends what still runs; Ray calls it once a replica that it takes away has no more work."""
        if app := getattr(self, "_app", None):
            app.service.stop()
        for owner in ("_engine", "_model"):
            if opened := getattr(self, owner, None):
                opened.close()


def _scope(call: Call) -> dict[str, Any]:
    headers = [(b"content-length", str(len(call.body)).encode())]
    if call.content_type:
        headers.append((b"content-type", call.content_type))
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": headers,
        "client": None,
        "server": None,
        "mustafar.request_id": call.identity,
    }


def _receiver(call: Call) -> Any:
    """receive of ASGI: the body, and then nothing; who is gone has the whole answer cancelled."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    return receive
