"""What every request passes first: its host, its key, its size; and what is written down of it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, internal_error
from .metrics import Metrics
from .settings import Settings

logger = logging.getLogger("mustafar.server")

_BODY_SECONDS = 60.0  # for a body to arrive in


class Guard:
    """Refuses what must not reach the routes, and logs what was answered, without its content.

    Args:
        app: The routes.
        settings: Keys, hosts and limits.
        metrics: Where answers are counted.
        open_paths: Paths that need no key.
        known_paths: Paths that metrics may name, each by itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        open_paths: frozenset[str],
        known_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._open = open_paths
        self._known = known_paths
        self._keys = [_digest(key.encode()) for key in settings.api_keys]
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # there are no websockets: the connection is refused
        began = time.perf_counter()
        # Where the request came through another of these, both logs call it the same.
        identity = scope.setdefault("mustafar.request_id", uuid.uuid4().hex)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = identity
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            try:
                self._check(scope)
                await self._app(scope, self._limited(scope, receive), answer)
            except ApiError as error:
                await error.response()(scope, receive, answer)
        except ClientDisconnect:
            pass
        except Exception as error:
            # Not its message: that may quote a prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s: %s\n%s", identity, type(error).__name__, where)
            if status == 0:
                await internal_error().response()(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self._known else "other"
            status = status or 499  # as nginx has it: the client was gone first
            self._metrics.http.add(route=path, status=str(status))
            seconds = time.perf_counter() - began
            logger.info("%s %s %s %d %.3f s", identity, scope["method"], path, status, seconds)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts and _host_of(headers.get("host", "")) not in self._hosts:
            message = "this server is not reached by that name; --allow-host adds one"
            raise ApiError(403, message, "host_not_allowed")
        if self._keys and scope["path"] not in self._open:
            self._check_key(headers.get("authorization", ""))
        if scope["method"] != "POST":
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A web page of another site can send other types without asking.
            message = "the body must be JSON, with Content-Type: application/json"
            raise ApiError(415, message, "unsupported_media_type")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _check_key(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip().encode("latin-1"))
        # Every key is compared, each in a time that says nothing of it.
        right = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(
                401,
                "the API key is missing or wrong: Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _too_large(self) -> ApiError:
        error = ApiError(
            413,
            f"the body has more than {self._settings.max_body_bytes} bytes",
            "body_too_large",
            headers={"Connection": "close"},  # the rest of it is not read
        )
        self._metrics.refused.add(code=error.code)
        return error

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """receive, of a body within the limit that comes within some time."""
        seen = 0
        complete = False
        end = asyncio.get_running_loop().time() + _BODY_SECONDS

        async def limited() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()  # the end of the connection
            left = end - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                late = f"the body did not arrive within {_BODY_SECONDS:g} seconds"
                raise ApiError(408, late, "body_timeout") from None
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > self._settings.max_body_bytes:
                raise self._too_large()
            return message

        return limited


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_of(header: str) -> str:
    """A Host header without its port."""
    host = header.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
