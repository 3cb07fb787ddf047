"""The routes, and the application that they make."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..engine import Engine
from ..types import KVConfig
from . import chat, completions, errors, metrics, openapi, tokens
from .answers import Reply
from .errors import ApiError
from .guard import Guard
from .service import Service
from .settings import Settings

_PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_ROUTES = {  # path: its method, and what answers
    **dict.fromkeys(_PAGE, ("GET", "_page")),
    "/health": ("GET", "_health"),
    "/metrics": ("GET", "_metrics"),
    "/openapi.json": ("GET", "_openapi"),
    "/v1/models": ("GET", "_models"),
    "/v1/models/{name:path}": ("GET", "_model"),
    "/v1/chat/completions": ("POST", "_chat"),
    "/v1/completions": ("POST", "_completions"),
    "/v1/embeddings": ("POST", "_embeddings"),
    "/tokenize": ("POST", "_tokenize"),
    "/detokenize": ("POST", "_detokenize"),
}
KNOWN_PATHS = frozenset(_ROUTES)
OPEN_PATHS = frozenset({*_PAGE, "/health"})  # need no key
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class App:
    """An ASGI application that serves an engine.

    Attributes:
        service: What is behind the routes; ``service.stop()`` ends requests that run.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.service = Service(engine, settings)
        starlette = Starlette(
            routes=_Routes(self.service).all(),
            exception_handlers={
                HTTPException: errors.of_http,
                ApiError: errors.of_api,
                ClientDisconnect: errors.of_disconnect,
                Exception: errors.of_failure,  # raised again, for the log
            },
        )
        self._app: ASGIApp = Guard(
            starlette,
            settings,
            self.service.metrics,
            open_paths=OPEN_PATHS,
            known_paths=KNOWN_PATHS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def create_app(engine: Engine, settings: Settings | None = None) -> App:
    """An ASGI application that answers with an engine, as OpenAI's API does.

    Args:
        engine: It must outlive the application, which does not close it.
        settings: Keys, names and limits.

    Raises:
        TokenizerError: The model has no tokenizer.
    """
    return App(engine, settings or Settings())


async def read_json(request: Request) -> dict[str, Any]:
    """The body, which must be a JSON object."""
    data = await request.body()
    try:
        body = await run_in_threadpool(json.loads, data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        message = f"the body is not JSON: {error}" if len(str(error)) < 200 else "it is not JSON"
        raise ApiError(400, message, "invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Route]:
        """Every route."""
        return [
            Route(path, getattr(self, name), methods=[method])
            for path, (method, name) in _ROUTES.items()
        ]

    async def _page(self, request: Request) -> Response:
        name = _PAGE[request.url.path]
        data = resources.files(__package__).joinpath("page", name).read_bytes()
        kind = _TYPES[name.rpartition(".")[2]]
        return Response(data, media_type=kind, headers=_PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        if self._service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        text = self._service.metrics.text(*_engine_numbers(self._service.engine))
        return Response(text, media_type=metrics.CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.description(self._service.settings))

    async def _models(self, request: Request) -> Response:
        data = [self._model_object(name) for name in self._service.names]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.find_model(name)
        return JSONResponse(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "mustafar",
            "max_model_len": service.context,
            "kv": _kv_fields(service.engine.kv),
        }

    async def _chat(self, request: Request) -> Response:
        body = await read_json(request)
        return await self._answer(request, body, chat.begin)

    async def _completions(self, request: Request) -> Response:
        body = await read_json(request)
        return await self._answer(request, body, completions.begin)

    async def _answer(self, request: Request, body: dict[str, Any], begin: Any) -> Response:
        streams = errors.flag_field(body, "stream")
        with ExitStack() as slot:
            if streams:
                slot.enter_context(self._service.stream_slot())
            reply: Reply = await begin(self._service, body)
            if streams:
                return reply.stream(slot.pop_all())
        return await reply.whole(request.receive)

    async def _embeddings(self, request: Request) -> Response:
        raise ApiError(400, "/v1/embeddings is not served", "unsupported_endpoint")

    async def _tokenize(self, request: Request) -> Response:
        body = await read_json(request)
        return JSONResponse(await tokens.tokenize(self._service, body))

    async def _detokenize(self, request: Request) -> Response:
        body = await read_json(request)
        return JSONResponse(await tokens.detokenize(self._service, body))


def _kv_fields(kv: KVConfig) -> dict[str, Any]:
    """A cache's setting, for people: a file's profile by its kind alone."""
    fields = kv._native()
    profile = fields["profile"]
    if profile is not None and profile not in ("auto", "hadamard", "model"):
        fields["profile"] = "file"
    return fields


def _engine_numbers(
    engine: Engine,
) -> tuple[dict[str, tuple[str, float]], dict[str, tuple[str, float]]]:
    """Gauges and counters of an engine, by name, each with its help."""
    now = engine.stats()
    memory = engine.model.memory()
    gauges = {
        "mustafar_requests_running": ("Requests that hold a cache.", now.running),
        "mustafar_requests_waiting": ("Requests that have not begun.", now.waiting),
        "mustafar_requests_paused": ("Requests that gave their cache up for now.", now.paused),
        "mustafar_kv_bytes": ("Bytes of all caches.", now.kv_bytes),
        "mustafar_kv_budget_bytes": ("The most bytes of caches; 0: no limit.", memory.kv_budget),
        "mustafar_prefixes": ("States of caches kept for prompts to come.", now.prefixes),
        "mustafar_prefix_bytes": ("Bytes of those, a part of all.", now.prefix_bytes),
        "mustafar_swap_bytes": ("Bytes of paused caches beside the budget.", now.swap_bytes),
        "mustafar_weights_bytes": ("Bytes of the model's tensors.", memory.weights_bytes),
    }
    counts = {
        "mustafar_requests_finished_total": ("Requests that came to their end.", now.finished),
        "mustafar_requests_cancelled_total": ("Requests cancelled or timed out.", now.cancelled),
        "mustafar_requests_failed_total": ("Requests that ended with an error.", now.failed),
        "mustafar_requests_repruned_total": ("Caches compressed again for room.", now.repruned),
        "mustafar_generated_tokens_total": ("Tokens made.", now.generated_tokens),
        "mustafar_prompt_tokens_total": ("Tokens of prompts computed.", now.prompt_tokens),
        "mustafar_reused_tokens_total": ("Tokens of prompts that were kept.", now.reused_tokens),
    }
    return dict(gauges), dict(counts)
