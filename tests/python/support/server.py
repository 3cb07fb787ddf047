"""A server on a free port of this machine, and engines whose requests wait for a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import uvicorn

import mustafar
from mustafar.server import Settings, create_app
from mustafar.server.app import App


@contextmanager
def serving(engine: mustafar.Engine, settings: Settings | None = None) -> Iterator[tuple[str, App]]:
    """The address of a server and its application, while the block runs."""
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app
    finally:
        app.service.stop()
        server.should_exit = True
        thread.join()


def wait_for(true: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until something is true; fails the test where it does not become so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class GatedEngine(mustafar.Engine):
    """An engine that makes a request's first ``free_tokens`` tokens, and then waits for ``gate``."""

    gate: threading.Event
    free_tokens: int = 3  # enough for a round of the engine to end: its counts are as of the last

    def submit(self, prompt: Any, params: Any = None, **options: Any) -> mustafar.Request:
        gate, left = self.gate, [self.free_tokens]

        def wait(_: np.ndarray, logits: np.ndarray) -> None:
            if left[0] == 0:
                gate.wait()
            left[0] -= left[0] > 0

        return super().submit(prompt, replace(params, logits_processor=wait), **options)


class ForcedEngine(mustafar.Engine):
    """An engine whose every reply is a text."""

    says: str = ""

    def submit(self, prompt: Any, params: Any = None, **options: Any) -> mustafar.Request:
        tokenizer = self.model.tokenizer
        ids = iter([*tokenizer.encode(self.says, add_special=False), tokenizer.eos_ids[0]])

        def force(_: np.ndarray, logits: np.ndarray) -> None:
            logits[:] = -1e9
            logits[next(ids)] = 0

        return super().submit(prompt, replace(params, logits_processor=force), **options)
