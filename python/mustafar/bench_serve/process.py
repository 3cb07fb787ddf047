"""A server of this package's own, started for a measurement."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

_END_SECONDS = 40.0  # more than the server's own --grace
_LAST_LINES = 20


class StartError(Exception):
    """A server that did not start; says what it said."""


@dataclass(frozen=True)
class Started:
    """A server that runs."""

    url: str
    pid: int
    command: tuple[str, ...]


@asynccontextmanager
async def started(
    options: Sequence[str], log: Callable[[str], None] = lambda line: None
) -> AsyncIterator[Started]:
    """``mustafar serve`` with these options, on a free port; it ends with the block.

    log: takes the lines that it writes while it runs.
    """
    words = ("--port", "0", *options)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mustafar.server", *words), stderr=asyncio.subprocess.PIPE
    )
    reader: asyncio.Task[None] | None = None
    try:
        url = await _url_of(process)
        reader = asyncio.create_task(_drain(process, log))
        yield Started(url, process.pid, ("mustafar", "serve", *words))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _END_SECONDS)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
        if reader is not None:
            await reader


async def _url_of(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    last: deque[str] = deque(maxlen=_LAST_LINES)
    async for line in process.stderr:
        text = line.decode("utf-8", "replace").rstrip()
        if found := re.search(r" at (http://\S+)/v1", text):
            return found[1]
        last.append(text)
    raise StartError("mustafar serve did not start:\n" + "\n".join(last))


async def _drain(process: asyncio.subprocess.Process, log: Callable[[str], None]) -> None:
    """Reads its log, whatever becomes of it: a pipe that is full would stop it."""
    assert process.stderr is not None
    with contextlib.suppress(ValueError):  # a line that is too long
        async for line in process.stderr:
            log(line.decode("utf-8", "replace").rstrip())
