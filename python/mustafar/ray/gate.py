"""What takes requests in, and hands them to replicas."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..server import metrics
from ..server.app import KNOWN_PATHS, OPEN_PATHS
from ..server.errors import ApiError, internal_error, queue_full
from ..server.guard import Guard
from ..server.settings import Settings
from .call import Begins, Call, begins

_HEALTH_SECONDS = 5.0
_METRICS_SECONDS = 10.0
_ID_HEADER = "x-request-id"
_PLAIN_ID = r"[\w.-]{1,64}"
# The header, by Ray's own name for it, that puts requests with the same value together.
_SESSION_HEADER = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id")

logger = logging.getLogger("mustafar.server")


class Gate:
    """Checks requests as the server does, and passes them on.

    Args:
        replicas: Where to.
        settings: Keys, hosts and limits.
        beginning: Characters of a text that tell one beginning from another.
    """

    def __init__(self, replicas: DeploymentHandle[Any], settings: Settings, beginning: int) -> None:
        logger.setLevel(logging.INFO)
        self._app = Guard(
            Relay(replicas, settings, beginning),
            settings,
            metrics.Metrics(),
            open_paths=OPEN_PATHS,
            known_paths=KNOWN_PATHS,
        )

    async def __call__(self, request: Request) -> Response:
        return _Passed(self._app)


class _Passed(Response):
    """What an application answers to a request, which Ray has named."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = scope.get("root_path", "")
        scope = {**scope, "path": scope["path"].removeprefix(root) or "/", "root_path": ""}
        given = Headers(scope=scope).get(_ID_HEADER, "")
        if re.fullmatch(_PLAIN_ID, given):  # of a client, maybe: it stands in the log
            scope["mustafar.request_id"] = given

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[_ID_HEADER]  # Ray's proxy adds it
            await send(message)

        await self._app(scope, receive, answer)


class Relay:
    """An application that lets replicas answer, and says what became of one that is gone."""

    def __init__(self, replicas: DeploymentHandle[Any], settings: Settings, beginning: int) -> None:
        self._replicas = replicas
        self._settings = settings
        self._beginning = beginning

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        call = Call(
            identity=scope["mustafar.request_id"],
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"],
            body=await request.body(),
            content_type=request.headers.get("content-type", "").encode("latin-1"),
        )
        if call.method == "GET" and call.path == "/health":
            await (await self._health(call))(scope, receive, send)
        elif call.method == "GET" and call.path == "/metrics":
            await (await self._metrics(call))(scope, receive, send)
        else:
            await self._pass_on(call, request.headers, send)

    async def _pass_on(self, call: Call, headers: Headers, send: Send) -> None:
        start: Message | None = None  # held back until some of the body is there
        begun = False
        response = await self._begin(call, headers)
        try:
            async for message in response:
                if message["type"] == "http.response.start":
                    start = message
                    continue
                if start is not None and not begun:
                    begun = True
                    await send(start)
                await send(message)
        except Exception as error:
            known = self._told(error)
            if not begun:
                raise known from error
            logger.error("%s: %s, in its answer", call.identity, type(error).__name__)
            if not _is_event_stream(start):
                raise  # breaks the connection: nothing else tells that it is not whole
            event = b"data: " + json.dumps(known.body, separators=(",", ":")).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            response.cancel()  # nothing, where it has ended

    async def _begin(self, call: Call, headers: Headers) -> Any:
        """Ray's response to a call, whose items are messages of ASGI."""
        opening = Begins()
        if call.body:
            opening = await run_in_threadpool(begins, call.body, self._beginning)
        session = headers.get(_SESSION_HEADER) or opening.key
        handle = self._replicas.options(method_name="answer", stream=True, session_id=session)
        if opening.prompt:
            return handle.remote(call.with_prompt(opening.prompt))
        # Ray's PrefixCacheAffinityRouter wants a text of everything that stands here by position.
        return handle.remote(call=call)

    async def _health(self, call: Call) -> Response:
        response: Any = self._replicas.options(method_name="whole").remote(call=call)
        try:
            _, status, body = await asyncio.wait_for(response, _HEALTH_SECONDS)
        except (RayError, BackPressureError, DeploymentUnavailableError, asyncio.TimeoutError):
            response.cancel()
            return JSONResponse({"status": "no replica answers"}, 503)
        return Response(body, status, media_type="application/json")

    async def _metrics(self, call: Call) -> Response:
        try:
            answers = await self._replicas.broadcast("whole", call=call).results_async(
                timeout_s=_METRICS_SECONDS, return_exceptions=True
            )
        except (DeploymentUnavailableError, TimeoutError) as error:
            raise self._told(error) from error
        pages = {
            answer[0]: answer[2].decode()
            for answer in answers
            if not isinstance(answer, BaseException)  # one that has just ended
        }
        return PlainTextResponse(merged(pages), media_type=metrics.CONTENT_TYPE)

    def _told(self, error: Exception) -> ApiError:
        """What a client is told of a failure between here and a replica, or in it."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, BackPressureError):
            return queue_full(self._settings.retry_after)
        cause = getattr(error, "cause", None)
        lost = isinstance(error, RayActorError) or isinstance(cause, RayActorError)
        if lost or (isinstance(error, RayError) and not isinstance(error, RayTaskError)):
            message = "the process that worked on this request has ended; send the request again"
            return ApiError(503, message, "replica_lost", headers=self._later())
        if isinstance(error, (DeploymentUnavailableError, TimeoutError)):
            message = "no process that could answer is running"
            return ApiError(503, message, "no_replica", headers=self._later())
        return internal_error()

    def _later(self) -> dict[str, str]:
        return {"Retry-After": str(self._settings.retry_after)}


def _is_event_stream(start: Message | None) -> bool:
    if start is None:
        return False
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


def merged(pages: Mapping[str, str]) -> str:
    """Pages of metrics as one.

    Args:
        pages: By the replica's name, which every sample gets as the label ``replica``.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in sorted(pages.items()):
        family = ""
        for line in page.splitlines():
            if line.startswith("#"):
                if line.startswith("# HELP "):
                    family = line.split(" ", 3)[2]
                    heads[family] = []
                    samples.setdefault(family, [])
                heads[family].append(line)
            else:
                samples[family].append(_labelled(line, replica))
    lines = (line for family, head in heads.items() for line in (*head, *samples[family]))
    return "".join(line + "\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    name, _, value = sample.rpartition(" ")
    label = f'replica="{replica}"'
    if name.endswith("}"):
        return f"{name[:-1]},{label}}} {value}"
    return f"{name}{{{label}}} {value}"
