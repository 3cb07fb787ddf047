"""``mustafar serve``: loads a model and serves it until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from .. import _core
from ..engine import Engine
from ..model import Model
from ..types import KVConfig
from .app import App, create_app
from .options import in_url, is_loopback, kv_of, settings_of
from .settings import Settings

_EXIT_ERROR, _EXIT_USAGE, _EXIT_INTERRUPT = 1, 2, 130
_KEEP_ALIVE_SECONDS = 65


class Server(uvicorn.Server):
    """uvicorn, which gives running requests some time when it is told to stop."""

    def __init__(self, app: App, config: uvicorn.Config, grace: float) -> None:
        super().__init__(config)
        self._app = app
        self._grace = grace
        self.interrupted = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server in order, and not the process after it."""
        before = {each: signal.signal(each, self._told) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _told(self, number: int, frame: Any) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        if self.should_exit:  # the second time: now
            self.force_exit = True
            self._app.service.stop()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens, once it does."""
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        url = f"http://{in_url(self.config.host)}:{port}"
        name = self._app.service.names[0]
        print(f"mustafar: {name} at {url}/v1, a page to chat at {url}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests; ends those that still run when their time is over."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._app.service.stop)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def run(options: argparse.Namespace) -> int:
    """Serves as the options say, until it is told to stop; returns the exit status."""
    try:
        kv = kv_of(options)
        settings = settings_of(options)
        if not is_loopback(options.host) and not settings.api_keys:
            print(
                f"mustafar: warning: whoever reaches {options.host} may use this server; "
                "--api-key or MUSTAFAR_API_KEY asks for a key",
                file=sys.stderr,
            )
        return _serve(options, kv, settings)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPT
    except (ValueError, TypeError) as error:
        print(f"mustafar: {_with_option(str(error))}", file=sys.stderr)
        return _EXIT_USAGE
    except (_core.Error, OSError) as error:
        print(f"mustafar: {error}", file=sys.stderr)
        return _EXIT_ERROR


def _with_option(message: str) -> str:
    """A message that begins with a field of the cache, with the option for the field's name."""
    for name, option, _ in _core.kv_options():
        if message.startswith(name + " "):
            return option + message.removeprefix(name)
    return message


def _bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises OSError where the address can't be had."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen at {in_url(host)}:{port}: {error.strerror}") from error
    return bound


def _serve(options: argparse.Namespace, kv: KVConfig, settings: Settings) -> int:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.Formatter.converter = time.gmtime
    logging.getLogger("mustafar.server").setLevel(logging.INFO)
    host = options.host.strip("[]")
    with (
        _bind(host, options.port) as bound,  # before a model is read for nothing
        Model(
            options.model,
            options.device,
            options.dtype,
            options.threads,
            weights=options.weights,
            kv_budget=options.kv_budget or None,
        ) as model,
        Engine(
            model,
            kv,
            max_batch=options.max_batch,
            max_waiting=options.max_waiting,
            prefill_tokens=options.prefill_tokens,
            prefix_cache=options.prefix_cache,
            prefix_bytes=options.prefix_bytes or None,
            on_pressure=options.on_pressure,
            swap_bytes=options.swap_bytes,
        ) as engine,
    ):
        app = create_app(engine, settings)
        config = uvicorn.Config(
            app,
            host=host,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(options.grace) + 5,
        )
        server = Server(app, config, options.grace)
        server.run(sockets=[bound])
        return _EXIT_INTERRUPT if server.interrupted else 0
