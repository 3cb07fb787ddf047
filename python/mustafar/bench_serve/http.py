"""An HTTP client that costs little: one connection for every request, read as it comes."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

_READ_BYTES = 1 << 16
_MOST_LINE_BYTES = 1 << 24  # of a stream of events


class HttpError(Exception):
    """An answer that is none, or not of the kind that was asked for."""


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        host, port: Of the connection.
        tls: Whether it is https.
        root: What every path begins with, mostly nothing.
        headers: Sent with every request.
    """

    host: str
    port: int
    tls: bool
    root: str
    headers: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, url: str, api_key: str | None = None) -> Address:
        """Of a URL, with or without /v1 at its end; raises ValueError for what is none."""
        parts = urlsplit(url if "://" in url else "http://" + url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url must be as http://127.0.0.1:8000, not {url!r}")
        tls = parts.scheme == "https"
        headers = [("host", parts.netloc.rpartition("@")[2]), ("content-type", "application/json")]
        if api_key:
            headers.append(("authorization", f"Bearer {api_key}"))
        root = parts.path.rstrip("/").removesuffix("/v1")
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, tls, root, tuple(headers))

    @property
    def url(self) -> str:
        """The URL, without /v1."""
        return f"http{'s' if self.tls else ''}://{self.headers[0][1]}{self.root}"


class _Incoming:
    """What comes in on a connection.

    Attributes:
        came: When the last bytes were read, by time.perf_counter().
    """

    def __init__(self, wire: h11.Connection, reader: asyncio.StreamReader) -> None:
        self.came = 0.0
        self._wire = wire
        self._reader = reader

    async def next_event(self) -> h11.Event:
        """The next part of an answer; raises HttpError where there is none."""
        while True:
            try:
                event = self._wire.next_event()
            except h11.RemoteProtocolError as error:
                raise HttpError(f"the answer is cut or no HTTP: {error}") from None
            if event is h11.NEED_DATA:
                data = await self._reader.read(_READ_BYTES)
                self.came = time.perf_counter()
                self._wire.receive_data(data)
            elif isinstance(event, h11.ConnectionClosed):
                raise HttpError("the server closed the connection without an answer")
            else:
                assert isinstance(event, h11.Event)
                return event


class Answer:
    """An answer whose head has come.

    Attributes:
        status: As HTTP has it.
    """

    def __init__(self, status: int, incoming: _Incoming) -> None:
        self.status = status
        self._incoming = incoming

    @property
    def came(self) -> float:
        """When its last bytes were read, by time.perf_counter()."""
        return self._incoming.came

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes; raises HttpError where it is cut."""
        while True:
            event = await self._incoming.next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return

    async def json(self) -> Any:
        """The body, which must be JSON."""
        data = b"".join([piece async for piece in self.pieces()])
        try:
            return json.loads(data)
        except ValueError:
            raise HttpError(f"status {self.status} without JSON: {data[:200]!r}") from None

    async def events(self) -> AsyncIterator[bytes]:
        """The data of server-sent events."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > _MOST_LINE_BYTES:
                raise HttpError("the stream has a line without end")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[len(b"data:") :].strip()


@asynccontextmanager
async def ask(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None = None
) -> AsyncIterator[Answer]:
    """Sends a request; its connection is closed when the block ends.

    Raises OSError where there is no server, HttpError where it does not answer as HTTP has it.
    """
    data = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(
        address.host, address.port, ssl=ssl.create_default_context() if address.tls else None
    )
    try:
        wire = h11.Connection(h11.CLIENT)
        headers = [*address.headers, ("content-length", str(len(data))), ("connection", "close")]
        request = h11.Request(method=method, target=address.root + path, headers=headers)
        sent = [wire.send(request), wire.send(h11.Data(data)), wire.send(h11.EndOfMessage())]
        with suppress(ConnectionError):  # a server may answer before it has read all
            writer.write(b"".join(part for part in sent if part))
            await writer.drain()
        incoming = _Incoming(wire, reader)
        while not isinstance(event := await incoming.next_event(), h11.Response):
            pass  # 100 Continue and the like
        yield Answer(event.status_code, incoming)
    finally:
        writer.close()


async def ask_json(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None = None
) -> Any:
    """The JSON of an answer with status 200; raises as :func:`ask`, and HttpError for others."""
    async with ask(address, method, path, body) as answer:
        found = await answer.json()
        if answer.status != 200:
            raise HttpError(f"{path}: status {answer.status}, {found}")
        return found


async def ask_text(address: Address, path: str) -> str | None:
    """What a path says, or None where it is not there."""
    async with ask(address, "GET", path) as answer:
        data = b"".join([piece async for piece in answer.pieces()])
        return data.decode("utf-8", "replace") if answer.status == 200 else None
